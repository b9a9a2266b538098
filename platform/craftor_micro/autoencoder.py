"""The micro autoencoder: principal components of 4x4 patches as encoder, a trained convolutional decoder.

diffusers' `AutoencoderTiny` puts no activation outside its residual blocks, so an encoder without blocks is linear
and can hold the principal components exactly: two strided convolutions move each 4x4 patch into 48 channels and a
1x1 tap projects them onto 8 scaled components. Nothing is left to train there, the latents are smooth and ordered
(large structure first), and diffusion on them can start at once. The decoder is trained to invert it from slightly
noisy latents, as a UNet's are.
"""

import time

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from jaxtyping import Float
from torch import Tensor

from craftor_micro.pool import Pool

PATCH, LATENT_CHANNELS, NUM_PIXELS = 4, 8, 48
SCALE_EXPONENT = 0.6
"""Each component is divided by std**0.6: between raw (0) and whitened (1), so that detail is neither lost nor all."""
LATENT_RMS = 0.4
"""Root mean square of the latents: the decoder soft-clamps at 3, and `scaling_factor` gives diffusion unit variance."""


def build_autoencoder(pool: Pool) -> AutoencoderTiny:
    """An autoencoder with the encoder set from the pool's principal components and a random decoder."""
    autoencoder = AutoencoderTiny(
        encoder_block_out_channels=(NUM_PIXELS,) * 3,
        decoder_block_out_channels=(48, 48, 48),
        num_encoder_blocks=(0, 0, 0),
        num_decoder_blocks=(2, 1, 1),
        latent_channels=LATENT_CHANNELS,
        upsampling_scaling_factor=2,
        scaling_factor=1 / LATENT_RMS,
        force_upcast=False,
    )
    mean, projection = principal_components(pool)
    with torch.no_grad():
        _set_linear_encoder(autoencoder.encoder.layers, mean, projection)
    autoencoder.encoder.requires_grad_(False)
    return autoencoder


def principal_components(pool: Pool, num: int = 2000) -> tuple[Float[Tensor, " 48"], Float[Tensor, "8 48"]]:
    """Mean and scaled components of patches in [0, 1], rows of the projection ordered by variance."""
    images = pool.batch(torch.arange(num))
    patches = F.unfold(images, PATCH, stride=PATCH).permute(0, 2, 1).reshape(-1, NUM_PIXELS)
    mean = patches.mean(0)
    variances, vectors = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
    order = variances.argsort(descending=True)[:LATENT_CHANNELS]
    std, components = variances[order].sqrt(), vectors[:, order].T
    scaled = components * (std**-SCALE_EXPONENT)[:, None]
    return mean, scaled * (LATENT_RMS / (std ** (2 - 2 * SCALE_EXPONENT)).mean().sqrt())


def _set_linear_encoder(layers: torch.nn.Sequential, mean: Tensor, projection: Tensor) -> None:
    """Fill conv (3->48), two strided convs and conv (48->8) so that they compute `projection @ (patch - mean)`."""
    copy, halve, quarter, project = (m for m in layers if isinstance(m, torch.nn.Conv2d))
    for conv in (copy, halve, quarter, project):
        conv.weight.zero_()
    for colour in range(3):
        copy.weight[colour, colour, 1, 1] = 1
    for stage, conv in ((1, halve), (2, quarter)):
        # Channel order after a stage: (colour, row, column) with the newest offsets least significant per axis.
        side = 2 ** (stage - 1)
        for colour in range(3):
            for row in range(side):
                for column in range(side):
                    source = (colour * side + row) * side + column
                    for dy in range(2):
                        for dx in range(2):
                            # The coarse step `stage` picks blocks, so it is the more significant offset.
                            target_row, target_column = dy * side + row, dx * side + column
                            target = (colour * 2 * side + target_row) * 2 * side + target_column
                            conv.weight[target, source, 1 + dy, 1 + dx] = 1
    project.weight[:, :, 1, 1] = projection
    assert copy.bias is not None and project.bias is not None
    copy.bias.zero_()
    project.bias.copy_(-projection @ mean)


def train_decoder(
    autoencoder: AutoencoderTiny, pool: Pool, *, num_steps: int, batch_size: int = 16, lr: float = 2e-3, seed: int = 0
) -> dict[str, float]:
    """Mean absolute plus squared error from latents with noise of up to 0.15 of their size; lr falls as a cosine."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(autoencoder.decoder.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=num_steps, pct_start=0.05)
    started = time.time()
    for step in range(num_steps):
        images = pool.batch(torch.randint(len(pool), (batch_size,), generator=generator))
        with torch.no_grad():
            latents = autoencoder.encode(images * 2 - 1).latents
            strength = 0.15 * LATENT_RMS * torch.rand(batch_size, 1, 1, 1, generator=generator)
            latents = latents + strength * torch.randn(latents.shape, generator=generator)
        decoded = autoencoder.decode(latents).sample / 2 + 0.5
        loss = F.l1_loss(decoded, images) + 4 * F.mse_loss(decoded, images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"autoencoder step {step + 1}/{num_steps}: {psnr(autoencoder, pool):.2f} dB")
    return {"psnr_db": psnr(autoencoder, pool), "seconds": time.time() - started}


@torch.no_grad()
def psnr(autoencoder: AutoencoderTiny, pool: Pool, num: int = 128) -> float:
    """Peak signal-to-noise ratio in dB of reconstructions of the pool's first images."""
    images = pool.batch(torch.arange(num))
    decoded = autoencoder.decode(autoencoder.encode(images * 2 - 1).latents).sample / 2 + 0.5
    return -10 * torch.log10(F.mse_loss(decoded.clamp(0, 1), images)).item()
