"""Captions by the referee, for the caption pipeline where no captioner of the world's own pictures exists.

Colours are left out: of an object they are its identity, which a reference tells.
"""

import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from craftor.locate import locate
from craftor_micro.captions import write
from craftor_micro.referee import Referee


class MicroCaptioner:
    """`craftor_micro.captioner:MicroCaptioner` as `captioner.model`."""

    def __init__(self) -> None:
        self.referee = Referee.load(locate("micro:referee"))

    def __call__(self, images: Sequence[Float[Tensor, "3 64 64"]]) -> list[str]:
        found = self.referee.read(torch.stack(list(images))).descriptions
        alone = [replace(d, objects=tuple(replace(o, colour=None) for o in d.objects)) for d in found]
        return [write(description, random.Random(0)) for description in alone]
