"""Rendered training pools in memory: uint8 images, their scenes and their captions, made from a seed."""

import random
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from rich.progress import track
from torch import Tensor

from craftor_micro.captions import corrupt, describe, write
from craftor_micro.render import render
from craftor_micro.world import Scenes, sample_scenes

CHUNK = 256


@dataclass(frozen=True)
class Pool:
    scenes: Scenes
    images: UInt8[Tensor, "n 3 64 64"]

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, rows: Tensor) -> Float[Tensor, "b 3 64 64"]:
        """Images in [0, 1]."""
        return self.images[rows].float() / 255


def render_pool(num: int, seed: int, *, held_out: bool = False, two_objects: float = 0.25) -> Pool:
    """Render `num` scenes; about a millisecond an image on one core."""
    scenes = sample_scenes(num, seed, held_out=held_out, two_objects=two_objects)
    images = torch.empty(num, 3, 64, 64, dtype=torch.uint8)
    for start in track(range(0, num, CHUNK), description=f"rendering {num} images", transient=True):
        rows = slice(start, start + CHUNK)
        images[rows] = (render(scenes[rows], seed=seed * 1_000_003 + start) * 255).round().to(torch.uint8)
    return Pool(scenes, images)


def captions(scenes: Scenes, seed: int, *, clean: bool) -> list[str]:
    """One caption per scene; unless `clean`, with the web's omissions and mistakes (`captions.corrupt`)."""
    rng = random.Random(seed)
    return [write(described if clean else corrupt(described, rng), rng) for described in describe(scenes)]
