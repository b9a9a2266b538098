"""Views of objects -> images and masks, by the renderer of `world`'s scenes; references cut out by their masks."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from craftor_micro.objects import PATTERNS, Views
from craftor_micro.render import COLOUR_TABLE, IMAGE_SIZE, backgrounds, distance, hazy, lit

NEUTRAL = 0.5


class Rendered(NamedTuple):
    images: Float[Tensor, "b 3 64 64"]
    masks: Float[Tensor, "b 1 64 64"]
    """Share of each pixel that the object covers."""


def render_views(views: Views, seed: int = 0) -> Rendered:
    """Images in [0, 1] with the masks of their objects; `seed` draws the phase of background textures."""
    scenes = views.scenes
    grid = torch.arange(IMAGE_SIZE) + 0.5
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    vivid, shading, shadow = (q[:, None, None, None] for q in scenes.quality.unbind(1))
    dx, dy = (x - scenes.center[:, 0, 0, None, None], y - scenes.center[:, 0, 1, None, None])
    radius, shape = scenes.radius[:, 0, None, None], scenes.shape[:, 0]
    shade = (0.5 - distance(shape, *_turned(views, dx - 3.5, dy - 3.5), radius) / 5.0).clamp(0, 1)
    image = backgrounds(scenes, x, y, torch.Generator().manual_seed(seed)) * (1 - 0.75 * shadow * shade[:, None])
    own_x, own_y = _turned(views, dx, dy)
    depth = distance(shape, own_x, own_y, radius)
    mask = (0.5 - depth).clamp(0, 1)[:, None]
    marked = _pattern(views, own_x / radius, own_y / radius, depth / radius) * radius
    marked = (0.5 + marked).clamp(0, 1)[:, None]
    first, second = (COLOUR_TABLE[scenes.colour[:, i]][:, :, None, None] for i in (0, 1))
    surface = lit(torch.lerp(first.expand_as(image), second.expand_as(image), marked), dx, dy, radius, shading)
    return Rendered(hazy(torch.lerp(image, surface, mask), vivid), mask)


def cut_out(rendered: Rendered, fill: Float[Tensor, "b 3"] | float = NEUTRAL) -> Float[Tensor, "b 3 64 64"]:
    """Objects alone, on a fill of one colour each, as references are shown to an image encoder."""
    colour = fill[:, :, None, None] if isinstance(fill, Tensor) else torch.full((1, 3, 1, 1), fill)
    return torch.lerp(colour.expand_as(rendered.images), rendered.images, rendered.masks)


def _turned(views: Views, dx: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Image coordinates in the object's own, upright frame."""
    angle = views.turn[:, None, None] * (math.pi / 180)
    return angle.cos() * dx + angle.sin() * dy, angle.cos() * dy - angle.sin() * dx


def _pattern(views: Views, u: Tensor, v: Tensor, depth: Tensor) -> Float[Tensor, "b 64 64"]:
    """About the distance in radii to the nearest change of colour, positive where the second colour is."""
    result = torch.empty_like(u)
    for index, name in enumerate(PATTERNS):
        rows = views.pattern == index
        if rows.any():
            result[rows] = _MARKED[name](u[rows], v[rows], depth[rows])
    return result


def _every(value: Tensor, period: float) -> Tensor:
    """Distance to the nearest multiple of a period."""
    return ((value / period + 0.5) % 1 - 0.5).abs() * period


def _wedges(u: Tensor, v: Tensor, depth: Tensor) -> Tensor:
    return (3 * torch.atan2(v, u)).sin() * (u**2 + v**2).sqrt() / 3


_MARKED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "halves": lambda u, v, depth: u,
    "cap": lambda u, v, depth: -0.1 - v,
    "quarters": lambda u, v, depth: (u * v).sign() * torch.minimum(u.abs(), v.abs()),
    "bands": lambda u, v, depth: 0.14 - _every(v, 0.62),
    "rings": lambda u, v, depth: 0.11 - _every((u**2 + v**2).sqrt() - 0.2, 0.5),
    "checker": lambda u, v, depth: (u * math.pi / 0.45).sin() * (v * math.pi / 0.45).sin() * 0.14,
    "dots": lambda u, v, depth: 0.18 - (_every(u - 0.28, 0.56) ** 2 + _every(v - 0.28, 0.56) ** 2).sqrt(),
    "wedges": _wedges,
    "rim": lambda u, v, depth: depth + 0.15,
    "saltire": lambda u, v, depth: 0.17 - torch.minimum((u + v).abs(), (u - v).abs()) / math.sqrt(2),
}
