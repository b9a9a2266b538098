"""Pairs of pictures of one object, and plain captioned pictures -> an object's cross-attention, and the UNet with it.

Regularised joint training after Taming Encoder (arXiv 2304.02642). A *domain* row is denoised to a picture of an object
while another picture of the same object is shown, so that what passes is its identity and not its pose; its caption is
of the scene. A *general* row is a captioned picture, the object off: prompts keep their meaning. With mask m,

    loss = w(t) * (mean (pred - target)^2  +  identity_weight * sum m (pred - target)^2 / sum m   on domain rows)
           + features.weight * unlike, where `task.features` asks for it (`object_features`)

Columns of a row: `latents` as base training has them, `prompt` and `input_ids`, `domain` (bool), `mask` (the object's
share of each latent cell) and `reference` (8-bit pixels of the cut-out object, as wide as the image encoder sees).
"""

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from jaxtyping import Bool, Float
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from craftor import object_adapter, object_condition, seeds, trainable
from craftor.attention import eager_is_faster
from craftor.diffuser import Diffuser, assert_frozen, load
from craftor.embed import embed
from craftor.object_condition import ImageEncoder
from craftor.recipe import ObjectEncoder, Recipe
from craftor.stream import Rows
from craftor.tasks.noising import clean, min_snr_weight, noised
from craftor.tasks.object_features import Unlike


class ObjectEncoderTask:
    """One UNet call for both kinds of rows; the object is off where its embedding is zero."""

    needs_start = False

    def __init__(self, recipe: Recipe, device: torch.device | str = "cpu") -> None:
        assert isinstance(recipe.task, ObjectEncoder)
        self.settings, self.seed = recipe.task, recipe.seed
        self.diffuser = load(recipe.model, device)
        reduced = self.diffuser.precision != torch.float32
        self.autocast = torch.autocast(
            self.diffuser.device.type, self.diffuser.precision if reduced else None, enabled=reduced
        )
        self.unet, self.image_encoder = build(self.diffuser, self.settings, recipe.seed)
        self.unet.requires_grad_(self.settings.tuned is not None and self.settings.tuned.method == "full")
        if self.settings.tuned is not None and self.settings.tuned.method == "lora":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(recipe.seed)
                self.unet.add_adapter(trainable.lora_config("unet", self.settings.tuned))
        self.unlike = None if self.settings.features is None else Unlike(self.settings.features, self.diffuser)
        self.module = self._trained()
        self.rates: Mapping[str, float | None] = {"unet": self.settings.tuned.lr if self.settings.tuned else None}
        self.unet.train()
        with torch.no_grad():
            self.null = self.diffuser.null().embeds

    def _trained(self) -> nn.ModuleDict:
        """The adapter's parameters and the UNet's own, apart, for they learn at rates of their own."""
        added = object_adapter.parameters(self.unet)
        for name, parameter in self.unet.named_parameters():
            if name.startswith("encoder_hid_proj.") or name in added:
                parameter.requires_grad_(name in added)
        own = {n: p for n, p in self.unet.named_parameters() if p.requires_grad and n not in added}
        parts = {"object": added, "unet": own}
        return nn.ModuleDict(
            {
                part: nn.ParameterDict({name.replace(".", "/"): p for name, p in parameters.items()})
                for part, parameters in parts.items()
                if parameters
            }
        )

    def observe(self, metrics: Mapping[str, Tensor]) -> dict[str, float]:
        """Means; errors apart for the two kinds of rows, and on the object where there is one."""
        domain = metrics["domain"] > 0
        error, object_error = metrics["error"], metrics["object_error"]
        figures = {"loss": metrics["loss"], "domain_share": metrics["domain"]}
        if domain.any():
            figures |= {"error_domain": error[domain], "error_object": object_error[domain]}
        if not domain.all():
            figures["error_general"] = error[~domain]
        if "unlike" in metrics and (compared := metrics["compared"] > 0).any():
            figures["unlike_object"] = metrics["unlike"][compared]
        return {name: values.mean().item() for name, values in figures.items()}

    def state(self) -> dict[str, float]:
        return {}

    def restore(self, state: Mapping[str, float]) -> None:
        assert not state

    def pictures(self) -> Tensor | None:
        return None

    def save(self, folder: Path, module: nn.ModuleDict | None = None) -> None:
        """`ip_adapter.safetensors` and `image_encoder/`, with `unet/` or `lora/` where the UNet trains too."""
        assert module is None, "its weights are part of the UNet, and not sharded"
        object_adapter.save(self.unet, folder)
        self.image_encoder.model.save_pretrained(folder / object_condition.FOLDER, safe_serialization=True)
        if self.settings.tuned is None:
            return
        if self.settings.tuned.method == "full":
            object_adapter.without_adapter(self.unet).save_pretrained(folder / "unet", safe_serialization=True)
        else:
            StableDiffusionPipeline.save_lora_weights(
                folder / trainable.LORA_FOLDER,
                unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(self.unet)),
                unet_lora_adapter_metadata=trainable.lora_config("unet", self.settings.tuned).to_dict(),
                safe_serialization=True,
            )

    def assert_frozen(self) -> None:
        for name, part in {**self.diffuser.encoders, "unet": self.diffuser.unet, "vae": self.diffuser.vae}.items():
            assert_frozen(part, name)
        assert_frozen(self.image_encoder.model, "image_encoder")

    def step(self, rows: Rows, share: float = 1.0) -> dict[str, Tensor]:
        device = self.diffuser.device
        domain = torch.from_numpy(rows.columns["domain"]).bool().to(device)
        text_on, object_on = self.kept(rows.position)
        with torch.no_grad():
            embeds = embed(self.diffuser.encoders, rows.ids(device)).embeds
        embeds = torch.where(text_on[:, None, None].to(device), embeds, self.null)
        seen = object_adapter.zero(self.image_encoder(self._references(rows)), domain & object_on.to(device))
        noisy, target, timesteps = drawn = noised(self.diffuser, rows, self.seed)
        with self.autocast:
            predicted = self.unet(noisy, timesteps, embeds, added_cond_kwargs={"image_embeds": [seen]}).sample
        squared = (predicted.float() - target).square().mean(dim=1)
        mask = torch.from_numpy(rows.columns["mask"]).float().view_as(squared).to(device)
        error = squared.mean(dim=(1, 2))
        object_error = (mask * squared).sum(dim=(1, 2)) / mask.sum(dim=(1, 2)).clamp(min=1e-6) * domain
        weight = min_snr_weight(self.diffuser, timesteps, self.settings.min_snr_gamma, self.settings.min_weight)
        loss = weight * (error + self.settings.identity_weight * object_error)
        found = {"error": error, "object_error": object_error, "domain": domain.float()}
        if self.unlike is not None:
            compared = domain & object_on.to(device) & (timesteps < self.unlike.settings.below)
            x0, latents = (clean(self.diffuser, drawn, output) for output in (predicted.float(), target))
            unlike = self.unlike(x0, latents, mask, compared)
            loss = loss + self.unlike.settings.weight * unlike
            found |= {"unlike": unlike, "compared": compared.float()}
        (share * loss.mean()).backward()
        found["loss"] = loss
        return {name: values.detach() for name, values in found.items()}

    def kept(self, position: list[int]) -> tuple[Bool[Tensor, " b"], Bool[Tensor, " b"]]:
        """Whether each sample sees its caption, and its object: conditions are dropped one by one, and together."""
        drawn = seeds.uniform(self.seed, position, "condition dropout")
        drop = self.settings.dropout
        text_off = (drawn < drop.text) | ((drawn >= drop.text + drop.object) & (drawn < drop.total))
        object_off = (drawn >= drop.text) & (drawn < drop.total)
        return ~text_off, ~object_off

    def _references(self, rows: Rows) -> Float[Tensor, "b 3 size size"]:
        size = self.image_encoder.size
        return torch.from_numpy(rows.columns["reference"]).view(-1, 3, size, size).to(self.diffuser.device) / 255


def build(diffuser: Diffuser, settings: ObjectEncoder, seed: int) -> tuple[UNet2DConditionModel, ImageEncoder]:
    """A copy of the pipeline's UNet with an adapter installed, untrained or a file's, and its image encoder."""
    if len(diffuser.encoders) > 1:
        raise ValueError("task.kind = object_encoder: a pipeline with two text encoders (SDXL) is not supported")
    encoder = object_condition.load(settings.image_encoder, settings.tokens, diffuser.device)
    unet = copy.deepcopy(diffuser.unet).float()
    if settings.adapter is None:
        state = object_adapter.initial(unet, encoder.width, settings.tokens, seed)
    else:
        state = object_adapter.with_null(object_adapter.read(Path(settings.adapter)))
        found, width = object_adapter.tokens_of(state), object_adapter.width_of(state)
        if (found, width) != (settings.tokens, encoder.width):
            raise ValueError(
                f"task.adapter = {settings.adapter!r}: made for {found} of width {width}, but task.tokens and "
                f"task.image_encoder give {settings.tokens} of width {encoder.width}"
            )
    object_adapter.install(unet, state, eager=eager_is_faster(diffuser.device, diffuser.precision != torch.float32))
    return unet, encoder
