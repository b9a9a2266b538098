"""Pipelines and rewards of real sizes with random weights, for `benchmarks.gpu`; and tiny ones of the same make."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel

from benchmarks.models import RewardSource, Workload, make_prompts, make_tokenizer

CLIP_L = {
    "text": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "vision": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
    },
    "projection_dim": 768,
}
CLIP_H = {
    "text": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    "vision": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
    },
    "projection_dim": 1024,
}
CLIP_TINY = {
    "text": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    "vision": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    },
    "projection_dim": 16,
}
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "sd15": {
        "unet": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        "vae": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 512},
        "text": CLIP_L["text"],
        "rewards": {"clip": ("clip_score", CLIP_L, 100.0), "pick": ("pick_score", CLIP_H, 1.0)},
    },
    "tiny": {
        "unet": {
            "sample_size": 8,
            "cross_attention_dim": 32,
            "attention_head_dim": 2,
            "block_out_channels": (8, 16, 16, 16),
            "norm_num_groups": 4,
            "layers_per_block": 1,
        },
        "vae": {
            "block_out_channels": (8, 8, 8, 8),
            "layers_per_block": 1,
            "sample_size": 64,
            "norm_num_groups": 4,
        },
        "text": CLIP_TINY["text"],
        "rewards": {"clip": ("clip_score", CLIP_TINY, 100.0), "pick": ("pick_score", CLIP_TINY, 1.0)},
    },
}
"""Stable Diffusion 1.5 with CLIP-L and PickScore's CLIP-H; the UNet's other numbers are diffusers' defaults, which are
1.5's."""


def stable_diffusion(shape: str, batch_size: int, folder: Path) -> Workload:
    """TextCraftor's settings (25 steps, guidance 7.5, K = 5) on a pipeline written to `folder`."""
    own = SHAPES[shape]
    save_pipeline(own, folder / "pipeline")
    rewards = {}
    for name, (kind, clip, weight) in own["rewards"].items():
        save_clip(clip, folder / name)
        rewards[name] = RewardSource(kind, folder / name, weight)
    return Workload(shape, folder / "pipeline", rewards, make_prompts(batch_size), guidance_scale=7.5)


def save_pipeline(shape: Mapping[str, Any], folder: Path) -> None:
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    levels = len(shape["vae"]["block_out_channels"])
    StableDiffusionPipeline(
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            latent_channels=4,
            **shape["vae"],
        ),
        text_encoder=CLIPTextModel(CLIPTextConfig(**text_tower(shape["text"], tokenizer))),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(**shape["unet"]),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder, safe_serialization=True)


def save_clip(shape: Mapping[str, Any], folder: Path) -> None:
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    size = shape["projection_dim"]
    text = text_tower(shape["text"], tokenizer) | {"projection_dim": size}
    config = CLIPConfig(text_config=text, vision_config=shape["vision"] | {"projection_dim": size}, projection_dim=size)
    CLIPModel(config).save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)


def text_tower(sizes: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """With the whole vocabulary of CLIP, of which the benchmark's own tokenizer uses the beginning."""
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return {**sizes, "vocab_size": 49408, "max_position_embeddings": 77, **special}
