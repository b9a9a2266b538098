"""A picture and its mask -> a square target around the object, and what is shown as the reference."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from craftor.object_condition import NEUTRAL

LARGEST_TURN = 20.0


def around(
    image: Float[Tensor, "3 H W"], mask: Float[Tensor, "1 H W"], size: int
) -> tuple[Float[Tensor, "3 size size"], Float[Tensor, "1 size size"]]:
    """The largest square of the picture, moved along its longer side to where the object's middle is."""
    height, width = image.shape[1:]
    side = min(height, width)
    middle = [(mask.sum(dim=(0, axis)) * torch.arange(length)).sum() / mask.sum() for axis, length in _axes(mask)]
    top, left = (int((float(at) + 0.5 - side / 2) // 1) for at in middle)
    top, left = max(0, min(top, height - side)), max(0, min(left, width - side))
    window = (slice(None), slice(top, top + side), slice(left, left + side))
    return resized(image[window], size), resized(mask[window], size)


def _axes(mask: Tensor) -> list[tuple[int, int]]:
    """For rows and for columns: the axis to sum over, and how many there are."""
    return [(2, mask.shape[1]), (1, mask.shape[2])]


def cut_out(
    image: Float[Tensor, "3 H W"], mask: Float[Tensor, "1 H W"], fill: Float[Tensor, " 3"], size: int
) -> Float[Tensor, "3 size size"]:
    """The object on a fill, the whole picture in a square: an encoder must not lose what a crop would cut off."""
    alone = torch.lerp(fill[:, None, None].expand_as(image), image, mask)
    height, width = image.shape[1:]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    square = fill[:, None, None].repeat(1, side, side)
    square[:, top : top + height, left : left + width] = alone
    return resized(square, size)


def fill(generator: torch.Generator) -> Float[Tensor, " 3"]:
    """The neutral one of inference half of the time, else any colour, lest the fill be learned."""
    neutral = torch.rand((), generator=generator) < 0.5
    return torch.full((3,), NEUTRAL) if neutral else torch.rand(3, generator=generator)


def disturbed(
    image: Float[Tensor, "3 H W"], mask: Float[Tensor, "1 H W"], generator: torch.Generator
) -> tuple[Float[Tensor, "3 H W"], Float[Tensor, "1 H W"]]:
    """Mirrored, turned, resized, moved and recoloured: what little else a single picture can be."""
    draws = torch.rand(7, generator=generator) * 2 - 1
    angle = torch.deg2rad(LARGEST_TURN * draws[0])
    zoom, mirror = 1 + 0.3 * draws[1], 1.0 if draws[2] < 0 else -1.0
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    height, width = image.shape[1:]
    aspect = height / width
    turn = torch.stack(
        [
            torch.stack([mirror * cos, -sin * aspect, 0.15 * draws[3]]),
            torch.stack([mirror * sin / aspect, cos, 0.15 * draws[4]]),
        ]
    )
    both = torch.cat([image, mask])[None]
    moved = F.grid_sample(both, F.affine_grid(turn[None], list(both.shape), align_corners=False), align_corners=False)[
        0
    ]
    contrast, brightness = 1 + 0.2 * draws[5], 0.1 * draws[6]
    return ((moved[:3] - 0.5) * contrast + 0.5 + brightness).clamp(0, 1), moved[3:]


def resized(image: Float[Tensor, "c H W"], size: int) -> Float[Tensor, "c size size"]:
    if image.shape[1:] == (size, size):
        return image
    made = F.interpolate(image[None], size=(size, size), mode="bicubic", antialias=True, align_corners=False)
    return made[0].clamp(0, 1)
