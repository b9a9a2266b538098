"""Scenes: what is in an image of the micro world, sampled as tensors and seeded.

A scene has one or two objects (shape, colour, size), a layout, a background (colour, texture) and three
*quality factors* that no caption mentions. `(colour, shape, background)` triples of `HELD_OUT` never occur in
training scenes: prompts that use them are the held-out prompts.
"""

from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLOURS = {
    "red": (0.86, 0.10, 0.12),
    "orange": (0.98, 0.55, 0.05),
    "yellow": (0.97, 0.90, 0.10),
    "green": (0.10, 0.65, 0.18),
    "cyan": (0.10, 0.85, 0.90),
    "blue": (0.12, 0.25, 0.90),
    "purple": (0.55, 0.12, 0.75),
    "pink": (0.98, 0.50, 0.75),
}
BACKGROUNDS = {
    "white": (0.95, 0.95, 0.95),
    "gray": (0.52, 0.52, 0.54),
    "black": (0.07, 0.07, 0.08),
    "brown": (0.42, 0.26, 0.14),
    "navy": (0.06, 0.08, 0.32),
    "olive": (0.38, 0.40, 0.12),
    "teal": (0.05, 0.36, 0.38),
    "cream": (0.96, 0.88, 0.68),
}
SIZES = ("small", "large")
TEXTURES = ("plain", "striped", "dotted")
RELATIONS = ("above", "below", "left of", "right of")  # of the first object to the second
POSITIONS = ("center", "left", "right", "top", "bottom")  # of a single object
QUALITY_FACTORS = ("vividness", "shading", "shadow")
QUALITY_WEIGHTS = (0.4, 0.3, 0.3)  # true quality = 10 * weighted sum of factors in [0, 1]

NUM_TRIPLES = len(COLOURS) * len(SHAPES) * len(BACKGROUNDS)


def _held_out_table() -> Bool[Tensor, "colours shapes backgrounds"]:
    """One triple in eight, chosen by a fixed seed, so that every colour, shape and background is still seen."""
    generator = torch.Generator().manual_seed(20240601)
    table = torch.zeros(NUM_TRIPLES, dtype=torch.bool)
    table[torch.randperm(NUM_TRIPLES, generator=generator)[: NUM_TRIPLES // 8]] = True
    return table.view(len(COLOURS), len(SHAPES), len(BACKGROUNDS))


HELD_OUT = _held_out_table()


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes as index tensors into the tables above; second-object columns are unused when `count` is 1."""

    count: Int[Tensor, " b"]
    shape: Int[Tensor, "b 2"]
    colour: Int[Tensor, "b 2"]
    size: Int[Tensor, "b 2"]
    layout: Int[Tensor, " b"]
    """Index into `POSITIONS` when there is one object, into `RELATIONS` when there are two."""
    background: Int[Tensor, " b"]
    texture: Int[Tensor, " b"]
    center: Float[Tensor, "b 2 2"]
    """Object centres (x, y) in pixels of a 64-pixel canvas."""
    radius: Float[Tensor, "b 2"]
    quality: Float[Tensor, "b 3"]
    """Factors in [0, 1], in the order of `QUALITY_FACTORS`."""

    def __len__(self) -> int:
        return len(self.count)

    def __getitem__(self, rows: slice | Tensor) -> "Scenes":
        return Scenes(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def rating(self) -> Float[Tensor, " b"]:
        """True quality in [0, 10]."""
        return 10 * self.quality @ torch.tensor(QUALITY_WEIGHTS)

    def held_out(self) -> Bool[Tensor, " b"]:
        """Whether any object of the scene is a held-out (colour, shape, background) triple."""
        hit = HELD_OUT[self.colour, self.shape, self.background[:, None]]
        return hit[:, 0] | (hit[:, 1] & (self.count == 2))


def sample_scenes(num: int, seed: int, *, held_out: bool = False, two_objects: float = 0.25) -> Scenes:
    """Draw `num` scenes that are all held out, or all not, by rejection; `two_objects` is the share with two."""
    generator = torch.Generator().manual_seed(seed)
    kept: list[Scenes] = []
    while sum(map(len, kept)) < num:
        scenes = _draw(max(num, 64), generator, two_objects)
        kept.append(scenes[scenes.held_out() == held_out])
    joined = {f.name: torch.cat([getattr(s, f.name) for s in kept]) for f in fields(Scenes)}
    return Scenes(**joined)[:num]


def with_quality(scenes: Scenes, quality: Float[Tensor, "b 3"]) -> Scenes:
    """The same scenes rendered with other quality factors."""
    return replace(scenes, quality=quality)


def _draw(num: int, generator: torch.Generator, two_objects: float) -> Scenes:
    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    count = 1 + (uniform(num) < two_objects).long()
    colour = integers(len(COLOURS), num, 2)
    # Two objects differ in colour, so that "the red one" is a description.
    colour[:, 1] = (colour[:, 0] + 1 + integers(len(COLOURS) - 1, num)) % len(COLOURS)
    size = integers(2, num, 2)
    single = (count == 1)[:, None]
    small, large = 9.5 + 2.0 * uniform(num, 2), 16.0 + 3.0 * uniform(num, 2)
    radius = torch.where(size == 1, torch.where(single, large, large.clamp(max=15.7)), small)
    layout = torch.where(count == 1, integers(len(POSITIONS), num), integers(len(RELATIONS), num))
    return Scenes(
        count=count,
        shape=integers(len(SHAPES), num, 2),
        colour=colour,
        size=size,
        layout=layout,
        background=integers(len(BACKGROUNDS), num),
        texture=integers(len(TEXTURES), num),
        center=_centers(count, layout, radius, uniform(num, 2, 2)),
        radius=radius,
        quality=uniform(num, 3),
    )


_SINGLE_CENTERS = torch.tensor([(32, 32), (20, 32), (44, 32), (32, 20), (32, 44)], dtype=torch.float32)
_PAIR_CENTERS = torch.tensor(  # for each relation: centre of the first, centre of the second
    [[(32, 16), (32, 48)], [(32, 48), (32, 16)], [(16, 32), (48, 32)], [(48, 32), (16, 32)]],
    dtype=torch.float32,
)


def _centers(count: Tensor, layout: Tensor, radius: Tensor, noise: Tensor) -> Float[Tensor, "b 2 2"]:
    """Nominal centres with a jitter of a few pixels that keeps every object on the canvas."""
    single = _SINGLE_CENTERS[layout].unsqueeze(1).expand(-1, 2, -1)
    pair = _PAIR_CENTERS[layout.clamp(max=len(RELATIONS) - 1)]
    nominal = torch.where((count == 1)[:, None, None], single, pair)
    jittered = nominal + (noise - 0.5) * torch.where(count == 1, 6.0, 4.0)[:, None, None]
    margin = radius[:, :, None] + 0.5
    return jittered.clamp(margin, 64 - margin)
