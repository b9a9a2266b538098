"""Images -> the same images a little blurred and noisy, so that a diffusion model's are not foreign to a classifier."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def augment(images: Float[Tensor, "b 3 h w"], generator: torch.Generator) -> Float[Tensor, "b 3 h w"]:
    """A 3x3 blur of random strength on half of the images, noise of up to 0.04 on all."""
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    mix = (torch.rand(len(images), 1, 1, 1, generator=generator) * 2 - 1).clamp(min=0)
    noise = 0.04 * torch.rand(len(images), 1, 1, 1, generator=generator)
    return torch.lerp(images, blurred, mix) + noise * torch.randn(images.shape, generator=generator)
