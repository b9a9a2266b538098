"""What the benchmarks train: a tiny random Stable Diffusion with random CLIP rewards, and the shipped micro model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from craftor_micro.tokenizer import build_tokenizer
from craftor_rewards import Reward, build

NUM_TOKENS = 77
"""Stable Diffusion's; the micro model has 24."""

_WEIGHTS = Path(__file__).resolve().parents[2] / "platform" / "craftor_micro" / "weights"


@dataclass(frozen=True)
class RewardSource:
    """A reward as a recipe names it, and its part in the sum."""

    kind: str
    weights: Path
    weight: float

    @property
    def settings(self) -> dict[str, str | float]:
        """Its section of a recipe."""
        return {"kind": self.kind, "weights": str(self.weights), "weight": self.weight}

    def load(self) -> Reward:
        return build(self.kind, self.weights)


@dataclass(frozen=True)
class Workload:
    """One training step's arithmetic, the same for every variant: only the procedure may differ."""

    name: str
    pipeline: Path
    rewards: dict[str, RewardSource]
    prompts: list[str]
    """One batch."""
    guidance_scale: float
    num_steps: int = 25
    window: int = 5
    """K: the last K denoising steps carry gradient."""
    lr: float = 1e-6

    def with_window(self, window: int) -> "Workload":
        return replace(self, window=window)


class PixelMean(nn.Module):
    """Mean colour value, in [0, 1]: a reward that costs nothing, so that what is timed is the chain."""

    differentiable = True
    needs_prompt = False

    def __init__(self, _weights: str | Path) -> None:
        super().__init__()

    def forward(self, images: Float[Tensor, "b 3 H W"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        return images.mean(dim=(1, 2, 3))


def workload(name: str, batch_size: int, folder: Path) -> Workload:
    """`tiny`, its files in `folder`, written there unless they are, or `micro`."""
    if name == "tiny":
        return tiny(batch_size, folder)
    if name == "micro":
        return micro(batch_size)
    raise ValueError(f"unknown model '{name}'; available: tiny, micro")


def tiny(batch_size: int, folder: Path) -> Workload:
    """The tiny SD under TextCraftor's settings: 25 DDIM steps, guidance 7.5, K = 5."""
    if not (folder / "pipeline").is_dir():
        save_tiny_clip(folder / "clip", seed=1)
        save_tiny_clip(folder / "pick", seed=2)
        save_tiny_pipeline(folder / "pipeline")
    return Workload(
        name="tiny",
        pipeline=folder / "pipeline",
        rewards={
            "clip": RewardSource("clip_score", folder / "clip", 100.0),
            "pick": RewardSource("pick_score", folder / "pick", 1.0),
            "pixel": RewardSource("benchmarks.models:PixelMean", folder, 1.0),
        },
        prompts=make_prompts(batch_size),
        guidance_scale=7.5,
    )


def micro(batch_size: int) -> Workload:
    """The shipped micro model with the rewards, weights and guidance of `recipes/micro_textcraftor.toml`."""
    return Workload(
        name="micro",
        pipeline=_WEIGHTS / "base",
        rewards={
            "clip": RewardSource("clip_score", _WEIGHTS / "reward_clip", 22.0),
            "aesthetic": RewardSource("aesthetic", _WEIGHTS / "aesthetic", 1.0),
        },
        prompts=make_prompts(batch_size),
        guidance_scale=4.0,
    )


def save_tiny_pipeline(folder: Path) -> Path:
    """A `StableDiffusionPipeline` folder: 985,444 weights in the UNet, 8x8x4 latents, 16-pixel images."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(32, 64),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            latent_channels=4,
            sample_size=16,
        ),
        text_encoder=CLIPTextModel(CLIPTextConfig(**_text_tower(tokenizer))),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=8,
        ),
        # Saved as every variant samples, so that the peers need no setting of ours.
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            timestep_spacing="trailing",
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder, safe_serialization=True)
    return folder


def save_tiny_clip(folder: Path, seed: int) -> Path:
    """A random `CLIPModel` for 12-pixel images: smaller than the 16 that the VAE gives, so that resizing is timed."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    text = _text_tower(tokenizer) | {"projection_dim": 32}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "projection_dim": 32,
        "image_size": 12,
        "patch_size": 4,
    }
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)).save_pretrained(
        folder, safe_serialization=True
    )
    tokenizer.save_pretrained(folder)
    return folder


def make_tokenizer() -> CLIPTokenizer:
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = NUM_TOKENS
    return tokenizer


def _text_tower(tokenizer: CLIPTokenizer) -> dict:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": NUM_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def make_prompts(batch_size: int) -> list[str]:
    shapes, colours = ("star", "ring", "square", "circle"), ("red", "blue", "green", "yellow")
    every = [f"a {size} {colour} {shape}" for size in ("small", "large") for colour in colours for shape in shapes]
    if not 1 <= batch_size <= len(every):
        raise ValueError(f"batch size {batch_size}; allowed: 1 to {len(every)}")
    return every[:batch_size]
