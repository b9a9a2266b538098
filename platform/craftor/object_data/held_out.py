"""Described objects -> what an object encoder is gauged on, and its gauges as scores and in words."""

from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from torch import Tensor

from craftor import uploads
from craftor.customize import Customizer
from craftor.object_condition import NEUTRAL
from craftor.object_data import framing
from craftor.object_data.describing import files
from craftor.object_gauges import HeldOut
from craftor.statistics import excludes_zero
from craftor.verdict import number


def held_out_objects(described: Path, customizer: Customizer, limit: int) -> HeldOut:
    """Two pictures of each object that has two, the second as its reference.

    Raises ValueError where fewer than two objects have: a shuffled reference must be of another.
    """
    size = customizer.diffuser.latent_shape[1] * customizer.diffuser.pixels_per_latent
    images: list[Tensor] = []
    masks: list[Tensor] = []
    captions: list[str] = []
    others: list[Tensor] = []
    for first, second in _pairs(described):
        if len(images) == limit:
            break
        image, mask = framing.around(uploads.picture(first["image"]).image, uploads.mask(first["mask"]), size)
        shown = (uploads.picture(second["image"]).image, uploads.mask(second["mask"]))
        images.append(image)
        masks.append(mask)
        captions.append(first["caption"])
        others.append(framing.cut_out(*shown, torch.full((3,), NEUTRAL), size))
    if len(images) < 2:
        raise ValueError(f"{described}: {len(images)} objects with two pictures; allowed: two or more such objects")
    return HeldOut(torch.stack(images), torch.stack(masks), captions, torch.stack(others))


def metrics(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Gauges as a version's scores: `base` is the loss on the object without a reference, `tuned` that with one."""
    paired = found["matched_to_none"]
    low, high = paired["ci95"]
    row = {"base": paired["tuned"], "tuned": paired["base"], "delta": -paired["delta"], "ci95": [-high, -low]}
    return {"object_loss": {**row, "win_rate": 1 - paired["win_rate"], "held_out": True}}


def tell(found: Mapping[str, Any], num: int) -> list[str]:
    """What the gauges mean, a line each."""
    losses = ", ".join(f"{name} {found[f'loss_{name}']:.4f}" for name in ("matched", "none", "shuffled"))
    carries = found["matched_to_none"]["ci95"][0] > 0 and found["none_to_shuffled"]["ci95"][0] > 0
    copies = excludes_zero(found["itself_to_matched"]["ci95"]) and found["copy_gap"] > 0
    return [
        f"loss on the object, {num} held-out objects: {losses}",
        "it carries identity: another picture of the object helps, one of another object harms"
        if carries
        else "it does not carry identity yet: expected matched < none < shuffled, with intervals apart",
        f"copy gap {number(100 * found['copy_gap'], 1, sign=True)} %: the loss with another picture over that with the "
        f"target itself{'; it gains from copying' if copies else ''}",
    ]


def _pairs(described: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for path in files(described):
        rows = pyarrow.parquet.read_table(path).to_pylist()
        for _, same in groupby(rows, key=lambda row: row["identity"]):
            first, second = (*list(same)[:2], None, None)[:2]
            if first is not None and second is not None:
                yield first, second
