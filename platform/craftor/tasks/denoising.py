"""Image-caption pairs -> denoising loss for the UNet: how a base model is made."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from craftor import seeds
from craftor.diffuser import assert_frozen, load
from craftor.embed import embed
from craftor.recipe import Denoising, Recipe
from craftor.stream import Rows
from craftor.tasks.noising import min_snr_weight, noised


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

    def save(self, folder: Path, module: nn.ModuleDict | None = None) -> None:
        unet: Any = (module or self.module)["unet"]
        unet.save_pretrained(folder / "unet", safe_serialization=True)

    def assert_frozen(self) -> None:
        assert_frozen(self.diffuser.text_encoder, "text_encoder")
        assert_frozen(self.diffuser.vae, "vae")

    def step(self, rows: Rows, share: float = 1.0) -> dict[str, Tensor]:
        device = self.diffuser.device
        with torch.no_grad():
            embeds = embed(self.diffuser.encoders, rows.ids(device)).embeds
        dropped = seeds.uniform(self.seed, rows.position, "caption dropout") < self.settings.caption_dropout
        embeds = torch.where(dropped[:, None, None].to(device), self.null, embeds)
        noisy, target, timesteps = noised(self.diffuser, rows, self.seed)
        with self.autocast:
            predicted = self.module["unet"](noisy, timesteps, embeds).sample
        weight = min_snr_weight(self.diffuser, timesteps, self.settings.min_snr_gamma, self.settings.min_weight)
        loss = weight * (predicted.float() - target).square().mean(dim=(1, 2, 3))
        (share * loss.mean()).backward()
        return {"loss": loss.detach()}
