"""The untrained micro Stable Diffusion: its parts put together in the Hugging Face layout, the UNet still random."""

from pathlib import Path

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from craftor_micro.autoencoder import LATENT_CHANNELS


def build_unet(cross_attention_dim: int) -> UNet2DConditionModel:
    """Cross-attention on the 8x8 and 4x4 grids only: at 16x16 it would cost more than all else together."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 128, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's betas, rescaled to end in pure noise, with velocity prediction (Lin et al. 2023)."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def assemble(autoencoder: Path, clip: Path, out: Path, seed: int, run: Path | None = None) -> None:
    """Save a `StableDiffusionPipeline` whose text encoder is the CLIP's text tower; the UNet is random, or a run's."""
    torch.manual_seed(seed)
    tower = CLIPModel.from_pretrained(clip, dtype=torch.float32)
    text_encoder = CLIPTextModel(tower.config.text_config)
    state = {k.removeprefix("text_model."): v for k, v in tower.state_dict().items() if k.startswith("text_model.")}
    target = set(text_encoder.state_dict())
    prefix = "text_model." if any(key.startswith("text_model.") for key in target) else ""
    text_encoder.load_state_dict({prefix + k: v for k, v in state.items()}, strict=True)
    StableDiffusionPipeline(
        vae=AutoencoderTiny.from_pretrained(autoencoder, dtype=torch.float32),
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(clip),
        unet=trained_unet(run) if run else build_unet(tower.config.text_config.hidden_size),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(out, safe_serialization=True)


def trained_unet(run: Path) -> UNet2DConditionModel:
    """The averaged UNet of a run's last complete checkpoint."""
    checkpoint = sorted(path for path in (run / "checkpoints").glob("step-*") if (path / "manifest.json").exists())[-1]
    return UNet2DConditionModel.from_pretrained(checkpoint / "unet")


def export(untrained: Path, run: Path, autoencoder: Path, out: Path) -> None:
    """The pipeline with a run's UNet and the autoencoder's trained decoder, in half precision."""
    pipeline = StableDiffusionPipeline.from_pretrained(
        untrained,
        unet=trained_unet(run),
        vae=AutoencoderTiny.from_pretrained(autoencoder),
        safety_checker=None,
        feature_extractor=None,
    )
    pipeline.to(dtype=torch.float16).save_pretrained(out, safe_serialization=True)
