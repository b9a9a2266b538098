"""Image-caption pairs -> denoising loss for the UNet: how a base model is made."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from craftor import seeds
from craftor.diffuser import assert_frozen, load
from craftor.embed import embed
from craftor.recipe import Denoising, Recipe
from craftor.stream import Rows


class DenoisingTask:
    """Velocity or noise prediction with min-SNR weights and caption dropout, on latents prepared in advance."""

    rates: Mapping[str, float | None] = {}
    needs_start = False

    def __init__(self, recipe: Recipe, device: torch.device | str = "cpu") -> None:
        assert isinstance(recipe.task, Denoising)
        self.settings, self.seed = recipe.task, recipe.seed
        self.diffuser = load(recipe.model, device)
        device = self.diffuser.device
        reduced = self.diffuser.precision != torch.float32
        self.autocast = torch.autocast(device.type, self.diffuser.precision if reduced else None, enabled=reduced)
        self.module = nn.ModuleDict({"unet": self.diffuser.unet.requires_grad_(True).train()})
        with torch.no_grad():
            self.null = self.diffuser.null().embeds

    def observe(self, metrics: Mapping[str, Tensor]) -> dict[str, float]:
        return {name: values.mean().item() for name, values in metrics.items()}

    def state(self) -> dict[str, float]:
        return {}

    def restore(self, state: Mapping[str, float]) -> None:
        assert not state

    def pictures(self) -> Tensor | None:
        return None

    def save(self, folder: Path) -> None:
        self.diffuser.unet.save_pretrained(folder / "unet", safe_serialization=True)

    def assert_frozen(self) -> None:
        assert_frozen(self.diffuser.text_encoder, "text_encoder")
        assert_frozen(self.diffuser.vae, "vae")

    def step(self, rows: Rows, share: float = 1.0) -> dict[str, Tensor]:
        device = self.diffuser.device
        latents = torch.from_numpy(rows.columns["latents"]).float().view(-1, *self.diffuser.latent_shape).to(device)
        with torch.no_grad():
            embeds = embed(self.diffuser.encoders, rows.ids(device)).embeds
        dropped = seeds.uniform(self.seed, rows.position, "caption dropout") < self.settings.caption_dropout
        embeds = torch.where(dropped[:, None, None].to(device), self.null, embeds)
        noise = seeds.normal(self.seed, rows.position, "noise", self.diffuser.latent_shape).to(device)
        scheduler = self.diffuser.scheduler
        num_timesteps = scheduler.config.num_train_timesteps
        timesteps = (seeds.uniform(self.seed, rows.position, "timestep") * num_timesteps).long().to(device)

        noisy = scheduler.add_noise(latents, noise, timesteps)
        velocity = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
        with self.autocast:
            predicted = self.module["unet"](noisy, timesteps, embeds).sample
        loss = self._weight(timesteps, velocity) * (predicted.float() - target).square().mean(dim=(1, 2, 3))
        (share * loss.mean()).backward()
        return {"loss": loss.detach()}

    def _weight(self, timesteps: Tensor, velocity: bool) -> Tensor:
        """min(SNR, gamma) on the error of x0, restated for the error of v (over SNR + 1) or of the noise (over SNR)."""
        alpha = self.diffuser.scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
        snr = alpha / (1 - alpha)
        weight = snr.clamp(max=self.settings.min_snr_gamma) / (snr + 1 if velocity else snr.clamp(min=1e-8))
        return weight.clamp(min=self.settings.min_weight)
