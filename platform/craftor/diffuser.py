"""A Stable Diffusion pipeline folder -> one record of frozen parts, ready for differentiable rollouts."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from craftor.attention import set_attention
from craftor.denoise import Guided
from craftor.embed import Condition, embed
from craftor.locate import locate
from craftor.onednn import use_onednn
from craftor.precision import PRECISIONS, dtype_of
from craftor.quiet import hush
from craftor.recipe import Model
from craftor.rollout import Rollout
from craftor.solver import schedule

ENCODERS = ("text_encoder", "text_encoder_2")
PARTS = ("tokenizer", "text_encoder", "unet", "vae", "scheduler")


@dataclass(frozen=True)
class Diffuser:
    """The parts of a text-to-image pipeline; all in eval mode and without gradient until a task says otherwise."""

    tokenizers: dict[str, CLIPTokenizer]
    """By the name of the encoder that reads them."""
    encoders: dict[str, CLIPTextModel | CLIPTextModelWithProjection]
    """`text_encoder`, and in SDXL `text_encoder_2`."""
    unet: UNet2DConditionModel
    vae: AutoencoderKL | AutoencoderTiny
    scheduler: DDIMScheduler
    """For its noise levels; steps are taken by `solver`."""
    pixels_per_latent: int
    zero_null: bool
    """SDXL was trained with zeros for the empty prompt."""
    precision: torch.dtype
    """Of the UNet's arithmetic."""
    compile: bool = False
    decoder_precision: torch.dtype = torch.float32
    """Of the decoder's, while training."""

    @property
    def text_encoder(self) -> CLIPTextModel:
        return self.encoders["text_encoder"]

    @property
    def tokenizer(self) -> CLIPTokenizer:
        return self.tokenizers["text_encoder"]

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device  # diffusers' own property walks through all parameters

    def guided(self, rollout: Rollout, unet: UNet2DConditionModel | None = None) -> Guided:
        """The denoiser of a rollout, in the model's precision; `unet` stands in for the frozen one."""
        steps, unet = schedule(self.scheduler, rollout.solver, rollout.num_steps), unet or self.unet
        if self.compile and unet._compiled_call_impl is None:
            unet.compile()  # here and not on loading: a copy of a compiled module would still run the original
        return Guided(unet, steps, rollout.guidance_scale, self.precision, self._time_ids)

    def hold_rounded(self) -> "Diffuser":
        """Store the UNet's weights as autocast rounds them at every call: the same bits, half the memory, no casts.

        For a UNet that only ever samples; one that trains learns in float32. Returns itself.
        """
        for module in self.unet.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):  # norms are computed in float32
                module.to(self.precision)
        return self

    @cached_property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self.unet.config.sample_size
        return (self.unet.config.in_channels, side, side)

    def tokenize(self, prompts: list[str]) -> dict[str, Tensor]:
        """Token ids `(b, n)` for each encoder, padded or cut to its tokenizer's length."""
        return {name: tokenize(tokenizer, prompts).to(self.device) for name, tokenizer in self.tokenizers.items()}

    def null(self, encoders: Mapping[str, nn.Module] | None = None) -> Condition:
        """The empty prompt's single row, by these encoders or the original ones."""
        condition = embed(encoders or self.encoders, self.tokenize([""]))
        return condition.map(torch.zeros_like) if self.zero_null else condition

    @cached_property
    def _time_ids(self) -> Tensor | None:
        """SDXL's (original height, width, crop top, left, target height, width): the whole of a native-size image."""
        if self.unet.config.addition_embed_type != "text_time":
            return None
        side = self.latent_shape[1] * self.pixels_per_latent
        return torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32, device=self.device)


def tokenize(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    return tokenizer(
        prompts, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
    ).input_ids


def load(model: Model, device: torch.device | str = "cpu") -> Diffuser:
    """Read a pipeline folder or hub id of Stable Diffusion 1.x, 2.x or XL. Raises ValueError where it is none."""
    hush()
    folder, device = locate(model.path), torch.device(device)
    family = _family(model.path, folder)
    try:
        pipeline = family.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, low_cpu_mem_usage=False, **_unused(family)
        )
    except OSError as error:
        raise ValueError(
            f"model.path = {model.path!r}: not a pipeline folder and not in the local hub cache ({error}); "
            f"fetch it with: hf download {model.path}"
        ) from None
    scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=False
    )
    encoders = {name: getattr(pipeline, name) for name in ENCODERS if getattr(pipeline, name, None) is not None}
    tokenizers = {name: getattr(pipeline, name.replace("text_encoder", "tokenizer")) for name in encoders}
    for part in (*encoders.values(), pipeline.unet, pipeline.vae):
        freeze(part).to(device)
    precision = dtype_of(model.precision, device)
    set_attention(pipeline.unet, model.attention, device, reduced=precision != torch.float32)
    if device.type == "cpu":
        use_onednn(pipeline.unet)
    for part in (pipeline.unet, pipeline.vae):
        if _is_faster_channels_last(part, precision, device) if model.channels_last is None else model.channels_last:
            part.to(memory_format=torch.channels_last)
    if model.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
        pipeline.vae.enable_gradient_checkpointing()
    zero_null = bool(getattr(pipeline.config, "force_zeros_for_empty_prompt", False))
    return Diffuser(
        tokenizers,
        encoders,
        pipeline.unet,
        pipeline.vae,
        scheduler,
        pipeline.vae_scale_factor,
        zero_null,
        precision,
        model.compile,
        PRECISIONS[model.decoder_precision],
    )


def _is_faster_channels_last(part: nn.Module, precision: torch.dtype, device: torch.device) -> bool:
    """On CPUs, but for group norms in bfloat16, which take twenty times as long there."""
    normed = any(isinstance(module, nn.GroupNorm) for module in part.modules())
    return device.type == "cpu" and (precision == torch.float32 or not normed)


FAMILIES: dict[str, type[DiffusionPipeline]] = {
    "StableDiffusionPipeline": StableDiffusionPipeline,
    "StableDiffusionXLPipeline": StableDiffusionXLPipeline,
}


def _family(path: str, folder: str) -> type[DiffusionPipeline]:
    """The pipeline class that `model_index.json` names. Raises ValueError for one that we cannot train."""
    try:
        config: dict[str, Any] = DiffusionPipeline.load_config(folder)
    except OSError as error:
        raise ValueError(
            f"model.path = {path!r}: not a pipeline folder and not in the local hub cache ({error}); "
            f"fetch it with: hf download {path}"
        ) from None
    name = config["_class_name"]
    if name not in FAMILIES:
        raise ValueError(f"model.path = {path!r}: a {name}; allowed: {', '.join(FAMILIES)}")
    missing = [part for part in PARTS if config.get(part, (None, None))[0] is None]
    if missing:
        raise ValueError(f"model.path = {path!r}: the pipeline lacks {', '.join(missing)}, needed here")
    return FAMILIES[name]


def _unused(family: type[DiffusionPipeline]) -> dict[str, None]:
    """Parts of a pipeline that no rollout needs."""
    return {"safety_checker": None, "feature_extractor": None} if family is StableDiffusionPipeline else {}


def freeze(module: nn.Module) -> nn.Module:
    """Eval mode, no parameter gradient."""
    return module.eval().requires_grad_(False)


def assert_frozen(module: nn.Module, name: str) -> None:
    """No parameter of a frozen module may ask for, or have received, a gradient."""
    for key, parameter in module.named_parameters():
        assert not parameter.requires_grad and parameter.grad is None, f"{name}.{key} is not frozen"
