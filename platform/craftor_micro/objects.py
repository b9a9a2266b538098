"""Objects with an identity: thousands of them, each seen in many scenes.

An identity is a shape, two colours and a pattern of the second colour on the first. A *view* puts it into a scene of
`world` (size, position, background, quality factors) and turns it a little. No identity of `HELD_OUT_IDENTITIES` is in
any training view. Captions say what a scene is and what kind of thing is in it, never which one: that is what a
reference image is for.
"""

import random
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from craftor_micro.captions import describe, write
from craftor_micro.world import COLOURS, SHAPES, Scenes, sample_scenes

PATTERNS = ("halves", "cap", "quarters", "bands", "rings", "checker", "dots", "wedges", "rim", "saltire")
IDENTITY = ("shape", "colour", "second_colour", "pattern")
_SIZES = (len(SHAPES), len(COLOURS), len(COLOURS) - 1, len(PATTERNS))
NUM_IDENTITIES = len(SHAPES) * len(COLOURS) * (len(COLOURS) - 1) * len(PATTERNS)
MAX_TURN = 25.0
"""Degrees either way: every pattern stays told from every other, and from itself with the colours swapped."""


def _held_out_identities() -> Bool[Tensor, " identities"]:
    """One in eight, by a fixed seed."""
    generator = torch.Generator().manual_seed(20261120)
    table = torch.zeros(NUM_IDENTITIES, dtype=torch.bool)
    table[torch.randperm(NUM_IDENTITIES, generator=generator)[: NUM_IDENTITIES // 8]] = True
    return table


HELD_OUT_IDENTITIES = _held_out_identities()


@dataclass(frozen=True)
class Views:
    """One object each, in a scene."""

    scenes: Scenes
    """With one object; the second column of `colour` is the pattern's."""
    pattern: Int[Tensor, " b"]
    turn: Float[Tensor, " b"]
    """Degrees, clockwise."""

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, rows: slice | Tensor) -> "Views":
        return Views(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    def attributes(self) -> dict[str, Int[Tensor, " b"]]:
        """Class indices by the names of `IDENTITY`."""
        colour = self.scenes.colour
        columns = (self.scenes.shape[:, 0], colour[:, 0], colour[:, 1], self.pattern)
        return dict(zip(IDENTITY, columns, strict=True))

    def identity(self) -> Int[Tensor, " b"]:
        """The number of each view's object, in `range(NUM_IDENTITIES)`."""
        shape, first, second, pattern = self.attributes().values()
        step = (second - first - 1) % len(COLOURS)
        return ((shape * _SIZES[1] + first) * _SIZES[2] + step) * _SIZES[3] + pattern


def identities(*, held_out: bool) -> Int[Tensor, " n"]:
    """Numbers of the identities for testing, or for training."""
    return (HELD_OUT_IDENTITIES if held_out else ~HELD_OUT_IDENTITIES).nonzero().flatten()


def sample_views(identity: Int[Tensor, " b"], seed: int) -> Views:
    """A new view of each identity, everything but the identity drawn at random."""
    scenes = sample_scenes(len(identity), seed, two_objects=0.0)
    generator = torch.Generator().manual_seed(seed + 1)
    turn = MAX_TURN * (2 * torch.rand(len(identity), generator=generator) - 1)
    small = scenes.size[:, :1] == 0
    quality = scenes.quality * torch.tensor([0.6, 1.0, 1.0]) + torch.tensor([0.4, 0.0, 0.0])  # never lost in haze
    larger = replace(scenes, radius=torch.where(small, scenes.radius + 1.5, scenes.radius), quality=quality)
    return _as_identity(larger, identity, turn)


def near_identical(views: Views, seed: int) -> Views:
    """The same scenes around an object that differs in one attribute, or in having its colours swapped."""
    generator = torch.Generator().manual_seed(seed)
    changes = torch.randint(5, (len(views),), generator=generator)
    shift = torch.rand(len(views), generator=generator)
    attributes = dict(views.attributes())
    first, second = attributes["colour"], attributes["second_colour"]
    for i, (name, num) in enumerate((("shape", len(SHAPES)), ("pattern", len(PATTERNS)))):
        moved = (attributes[name] + 1 + (shift * (num - 1)).long()) % num
        attributes[name] = torch.where(changes == i, moved, attributes[name])
    # Another first or second colour that is neither of the two there are.
    gap = (second - first) % len(COLOURS)
    step = 1 + (shift * (len(COLOURS) - 2)).long()
    other = (first + step + (step >= gap).long()) % len(COLOURS)
    swapped = changes == 4
    attributes["colour"] = torch.where(changes == 2, other, torch.where(swapped, second, first))
    attributes["second_colour"] = torch.where(changes == 3, other, torch.where(swapped, first, second))
    return _with(views, attributes)


def scene_captions(views: Views, seed: int) -> list[str]:
    """Kind of thing, size, position and background of each view, in one of many wordings; nothing of its identity.

    A shape is part of an identity and named all the same, as "dog" would be: it is what kind of thing it is.
    """
    rng = random.Random(seed)
    described = describe(views.scenes)
    return [write(replace(d, objects=(replace(d.objects[0], colour=None),)), rng) for d in described]


def _as_identity(scenes: Scenes, identity: Int[Tensor, " b"], turn: Tensor) -> Views:
    rest, pattern = identity // _SIZES[3], identity % _SIZES[3]
    rest, step = rest // _SIZES[2], rest % _SIZES[2]
    shape, first = rest // _SIZES[1], rest % _SIZES[1]
    second = (first + 1 + step) % len(COLOURS)
    values = dict(zip(IDENTITY, (shape, first, second, pattern), strict=True))
    return _with(Views(scenes, pattern, turn), values)


def _with(views: Views, attributes: dict[str, Tensor]) -> Views:
    scenes = replace(
        views.scenes,
        shape=torch.stack([attributes["shape"], views.scenes.shape[:, 1]], dim=1),
        colour=torch.stack([attributes["colour"], attributes["second_colour"]], dim=1),
    )
    return Views(scenes, attributes["pattern"], views.turn)
