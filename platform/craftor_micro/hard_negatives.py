"""Captions that are wrong in one attribute: a sharp alignment reward tells them from the true ones."""

import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from craftor_micro.captions import Description, describe, write
from craftor_micro.pool import Pool
from craftor_micro.world import BACKGROUNDS, COLOURS, POSITIONS, RELATIONS, SHAPES, SIZES, TEXTURES
from craftor_rewards.clip import ClipTowers

OBJECT_VALUES = {"shape": SHAPES, "colour": tuple(COLOURS), "size": SIZES}
REPLACED = (*OBJECT_VALUES, "position", "background", "texture")


def replace_attribute(description: Description, attribute: str, rng: random.Random) -> Description:
    """The description with one mentioned attribute, of either object, replaced by another value."""
    if attribute in OBJECT_VALUES:
        index = rng.randrange(len(description.objects))
        claim = description.objects[index]
        value = _other(OBJECT_VALUES[attribute], getattr(claim, attribute), rng)
        changed = replace(claim, **{attribute: value})
        objects = tuple(changed if i == index else o for i, o in enumerate(description.objects))
        return replace(description, objects=objects)
    if attribute == "position":
        layouts = RELATIONS if len(description.objects) == 2 else POSITIONS
        return replace(description, layout=_other(layouts, description.layout, rng))
    values = {"background": tuple(BACKGROUNDS), "texture": TEXTURES}[attribute]
    value = _other(values, getattr(description, attribute), rng)
    return replace(description, background=value) if attribute == "background" else replace(description, texture=value)


def caption_with_negatives(description: Description, attributes: Sequence[str], rng: random.Random) -> list[str]:
    """The true caption, then one per attribute that is wrong in it, all worded alike."""
    wording = rng.getrandbits(32)
    versions = [description, *(replace_attribute(description, a, rng) for a in attributes)]
    return [write(version, random.Random(wording)) for version in versions]


@torch.no_grad()
def hard_negative_accuracy(towers: ClipTowers, pool: Pool, seed: int) -> dict[str, float]:
    """For each attribute, how often the true caption of a render scores above the one where it is replaced."""
    rng = random.Random(seed)
    wins: dict[str, list[Tensor]] = {attribute: [] for attribute in REPLACED}
    described = describe(pool.scenes)
    for rows in torch.arange(len(pool)).split(125):
        captions = [caption_with_negatives(described[i], REPLACED, rng) for i in rows.tolist()]
        images = towers.image_features(pool.batch(rows))
        true, *wrong = ((images * towers.text_features(column)).sum(-1) for column in zip(*captions, strict=True))
        for attribute, scores in zip(REPLACED, wrong, strict=True):
            wins[attribute].append(true > scores)
    return {f"hard_negative_{name}": torch.cat(won).float().mean().item() for name, won in wins.items()}


def _other(values: Sequence[str], value: str | None, rng: random.Random) -> str:
    return rng.choice([v for v in values if v != value])
