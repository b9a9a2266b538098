"""A Stable Diffusion pipeline folder -> one record of frozen parts, ready for differentiable rollouts."""

import copy
from dataclasses import dataclass
from functools import cached_property

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from jaxtyping import Int
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from craftor.denoise import Guided
from craftor.locate import locate
from craftor.quiet import hush


@dataclass(frozen=True)
class Diffuser:
    """The parts of a text-to-image pipeline; all in eval mode and without gradient until a task says otherwise."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL | AutoencoderTiny
    scheduler: DDIMScheduler

    def guided(self, num_steps: int, guidance_scale: float, *, bf16: bool = False) -> Guided:
        """The denoiser on a `trailing` grid: of 1000 timesteps, 25 steps are 999, 959, ..., 39."""
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(num_steps)
        return Guided(self.unet, scheduler, guidance_scale, bf16)

    @cached_property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self.unet.config.sample_size
        return (self.unet.config.in_channels, side, side)

    def tokenize(self, prompts: list[str]) -> Int[Tensor, "b n"]:
        return self.tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=self.tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids


def load(path: str) -> Diffuser:
    """Read a pipeline folder or hub id. Raises ValueError where it is neither."""
    hush()
    folder = locate(path)
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            low_cpu_mem_usage=False,
            safety_checker=None,
            feature_extractor=None,
        )
    except OSError as error:
        raise ValueError(
            f"model.path = {path!r}: not a pipeline folder and not in the local hub cache ({error}); "
            f"fetch it with: hf download {path}"
        ) from None
    scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=False
    )
    if pipeline.unet.device.type == "cpu":
        # On CPU the batched-matmul attention is faster in both directions than the fused kernel at these sizes.
        pipeline.unet.set_attn_processor(AttnProcessor())
    for part in (pipeline.text_encoder, pipeline.unet, pipeline.vae):
        freeze(part)
    return Diffuser(pipeline.tokenizer, pipeline.text_encoder, pipeline.unet, pipeline.vae, scheduler)


def freeze(module: nn.Module) -> nn.Module:
    """Eval mode, no parameter gradient."""
    return module.eval().requires_grad_(False)


def assert_frozen(module: nn.Module, name: str) -> None:
    """No parameter of a frozen module may ask for, or have received, a gradient."""
    for key, parameter in module.named_parameters():
        assert not parameter.requires_grad and parameter.grad is None, f"{name}.{key} is not frozen"
