"""Scenes -> images: a vectorised, anti-aliased signed-distance renderer.

Every shape is a signed distance function (negative inside, in pixels); coverage is `clamp(1/2 - distance)`.
Quality factors act on pixels only: vividness scales contrast and saturation, shading lights objects from the
top left, shadow drops a soft shadow to the bottom right.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from craftor_micro.world import BACKGROUNDS, COLOURS, SHAPES, Scenes

IMAGE_SIZE = 64
COLOUR_TABLE = torch.tensor(list(COLOURS.values()))
_BACKGROUND_TABLE = torch.tensor(list(BACKGROUNDS.values()))


def render(scenes: Scenes, seed: int = 0) -> Float[Tensor, "b 3 64 64"]:
    """Images in [0, 1]; `seed` draws the phase of background textures."""
    grid = torch.arange(IMAGE_SIZE) + 0.5
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    image = backgrounds(scenes, x, y, torch.Generator().manual_seed(seed))
    vivid, shading, shadow = (q[:, None, None, None] for q in scenes.quality.unbind(1))
    for i in (1, 0):  # the first object is drawn last
        present = (scenes.count > i).float()[:, None, None]
        dx = x - scenes.center[:, i, 0, None, None]
        dy = y - scenes.center[:, i, 1, None, None]
        radius = scenes.radius[:, i, None, None]
        shade_alpha = (0.5 - distance(scenes.shape[:, i], dx - 3.5, dy - 3.5, radius) / 5.0).clamp(0, 1) * present
        image = image * (1 - 0.75 * shadow * shade_alpha[:, None])
        alpha = (0.5 - distance(scenes.shape[:, i], dx, dy, radius)).clamp(0, 1) * present
        colour = COLOUR_TABLE[scenes.colour[:, i]][:, :, None, None]
        image = image * (1 - alpha[:, None]) + lit(colour, dx, dy, radius, shading) * alpha[:, None]
    return hazy(image, vivid)


def lit(colour: Tensor, dx: Tensor, dy: Tensor, radius: Tensor, shading: Tensor) -> Float[Tensor, "b 3 64 64"]:
    """A colour under light from the top left."""
    light = (-(dx + dy) / (1.6 * radius)).clamp(-1, 1)[:, None]
    return colour * (1 + 0.55 * shading * light.clamp(max=0)) + (1 - colour) * 0.55 * shading * light.clamp(min=0)


def hazy(image: Tensor, vivid: Tensor) -> Float[Tensor, "b 3 64 64"]:
    """From a washed-out picture (factor 0.45 around a grey haze) to full contrast."""
    return (0.55 + (image - 0.55) * (0.45 + 0.55 * vivid)).clamp(0, 1)


def backgrounds(scenes: Scenes, x: Tensor, y: Tensor, generator: torch.Generator) -> Float[Tensor, "b 3 64 64"]:
    """Plain, striped or dotted, the texture's phase drawn from the generator."""
    base = _BACKGROUND_TABLE[scenes.background][:, :, None, None]
    phase = torch.rand(len(scenes), 2, 1, 1, generator=generator)
    stripes = ((math.pi / 5) * (y + 10 * phase[:, 0])).sin().mul(2.5).clamp(-1, 1)
    u = ((x / 12 + phase[:, 0]) % 1 - 0.5) * 12
    v = ((y / 12 + phase[:, 1]) % 1 - 0.5) * 12
    dots = (3.4 - (u**2 + v**2).sqrt() + 0.5).clamp(0, 1) * 2 - 1
    pattern = torch.stack([torch.full_like(stripes, -1.0), stripes, dots], dim=1)
    pattern = pattern[torch.arange(len(scenes)), scenes.texture][:, None]
    # The pattern is a lighter tint on dark backgrounds and a darker one on light ones.
    tint = torch.where(base.mean(1, keepdim=True) > 0.5, base * 0.72, base + 0.22)
    return base + (tint - base) * (pattern + 1) / 2


def distance(shape: Tensor, dx: Tensor, dy: Tensor, radius: Tensor) -> Float[Tensor, "b 64 64"]:
    """Signed distance in pixels to each row's shape of circumradius about `radius`; rows are grouped by shape."""
    result = torch.empty_like(dx)
    for index, name in enumerate(SHAPES):
        rows = shape == index
        if rows.any():
            result[rows] = _SHAPE_DISTANCE[name](dx[rows] / radius[rows], dy[rows] / radius[rows]) * radius[rows]
    return result


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return (x**2 + y**2).sqrt() - 0.95


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.84


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    side = math.cos(math.radians(62)) * (-y - 0.95) + math.sin(math.radians(62)) * x.abs()
    return torch.maximum(side, y - 0.8)


def _star(x: Tensor, y: Tensor) -> Tensor:
    sector, notch = math.pi / 5, 0.42
    angle = (torch.atan2(x, -y) % (2 * sector) - sector).abs()  # 0 at a notch, `sector` at a tip
    length = (x**2 + y**2).sqrt()
    px, py = length * angle.cos(), length * angle.sin()
    tip_x, tip_y = math.cos(sector), math.sin(sector)
    edge = math.hypot(tip_x - notch, tip_y)
    return ((px - notch) * tip_y - py * (tip_x - notch)) / edge


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return ((x**2 + y**2).sqrt() - 0.72).abs() - 0.25


def _cross(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.abs(), y.abs()
    return torch.minimum(torch.maximum(x - 0.3, y - 0.95), torch.maximum(y - 0.3, x - 0.95))


_SHAPE_DISTANCE = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
}
