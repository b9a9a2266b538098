"""Clean latents -> noisy ones, what the UNet is to predict of them, and how much each sample's error counts."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from craftor import seeds
from craftor.diffuser import Diffuser
from craftor.stream import Rows


class Noised(NamedTuple):
    noisy: Float[Tensor, "b c h w"]
    target: Float[Tensor, "b c h w"]
    timesteps: Int[Tensor, " b"]


def noised(diffuser: Diffuser, rows: Rows, seed: int) -> Noised:
    """The rows' latents at random noise levels, from each sample's own generator; velocity or noise to predict."""
    device = diffuser.device
    latents = torch.from_numpy(rows.columns["latents"]).float().view(-1, *diffuser.latent_shape).to(device)
    noise = seeds.normal(seed, rows.position, "noise", diffuser.latent_shape).to(device)
    num_timesteps = diffuser.scheduler.config.num_train_timesteps
    timesteps = (seeds.uniform(seed, rows.position, "timestep") * num_timesteps).long().to(device)
    return at(diffuser, latents, noise, timesteps)


def at(diffuser: Diffuser, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Noised:
    """Latents at given noise levels."""
    scheduler = diffuser.scheduler
    noisy = scheduler.add_noise(latents, noise, timesteps)
    target = scheduler.get_velocity(latents, noise, timesteps) if predicts_velocity(diffuser) else noise
    return Noised(noisy, target, timesteps)


def clean(diffuser: Diffuser, noised: Noised, predicted: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """The clean latents that a prediction implies, in one step."""
    alpha = diffuser.scheduler.alphas_cumprod.to(predicted)[noised.timesteps].view(-1, 1, 1, 1)
    if predicts_velocity(diffuser):
        return alpha.sqrt() * noised.noisy - (1 - alpha).sqrt() * predicted
    return (noised.noisy - (1 - alpha).sqrt() * predicted) / alpha.sqrt()


def min_snr_weight(diffuser: Diffuser, timesteps: Int[Tensor, " b"], gamma: float, least: float) -> Float[Tensor, " b"]:
    """min(SNR, gamma) on the error of x0, restated for the error of v (over SNR + 1) or of the noise (over SNR)."""
    alpha = diffuser.scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
    snr = alpha / (1 - alpha)
    weight = snr.clamp(max=gamma) / (snr + 1 if predicts_velocity(diffuser) else snr.clamp(min=1e-8))
    return weight.clamp(min=least)


def predicts_velocity(diffuser: Diffuser) -> bool:
    return diffuser.scheduler.config.prediction_type == "v_prediction"
