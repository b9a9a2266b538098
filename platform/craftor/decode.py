"""Latents -> images in [0, 1], and back."""

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from jaxtyping import Float
from torch import Tensor


def decode(
    vae: AutoencoderKL | AutoencoderTiny, latents: Float[Tensor, "b c h w"], precision: torch.dtype = torch.float32
) -> Float[Tensor, "b 3 H W"]:
    """Decode and clamp to [0, 1]; the gradient passes the clamp unchanged, so saturated pixels can recover.

    `precision` is that of the decoder's arithmetic; images have the latents' own.
    """
    with torch.autocast(latents.device.type, precision, enabled=precision != torch.float32):
        decoded = vae.decode(latents / vae.config.scaling_factor).sample
    images = decoded.to(latents.dtype) / 2 + 0.5
    return images + (images.clamp(0, 1) - images).detach()


def saturated(images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, " b"]:
    """Share of colour values at 0 or 1, per image."""
    return ((images <= 0) | (images >= 1)).float().mean(dim=(1, 2, 3))


def encode(vae: AutoencoderKL | AutoencoderTiny, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
    """The mean of what the autoencoder makes of images in [0, 1], so that nothing is drawn at random."""
    found = vae.encode(2 * images - 1)
    latents = found.latents if hasattr(found, "latents") else found.latent_dist.mode()
    return latents * vae.config.scaling_factor
