"""Described pictures -> the rows of `craftor.tasks.object_encoder`: each with another picture of its object beside it.

A domain row's target is a picture of an object, cropped square around it, with its mask and caption; its reference is
a *different* picture of the same object, cut out. An object with a single picture is its own reference, strongly
disturbed; how many such objects there are is told. General rows are captioned pictures without an object. Both kinds
alternate in a fixed pattern, so that every batch holds the same share of each.
"""

import json
import shutil
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import ray.data
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from jaxtyping import Bool
from torch import Tensor

from craftor import object_condition, seeds, uploads
from craftor.decode import encode
from craftor.diffuser import tokenize
from craftor.locate import locate
from craftor.object_data import framing
from craftor.object_data.describing import files

IMAGE, CAPTION = "image", "caption"
"""Columns of general Parquet files: a picture's bytes, and what it shows."""


@dataclass(frozen=True)
class Paired:
    num_rows: int
    num_domain: int
    num_objects: int
    num_alone: int
    """Objects with one picture, which are their own reference."""


@dataclass(frozen=True)
class Made:
    """What rows are made by."""

    pipeline: str
    image_encoder: str
    seed: int


class MakeRows:
    """Jobs of one file -> rows. A job is the number of a picture in the file and the index of the row it becomes."""

    def __init__(self, made: Made) -> None:
        torch.set_num_threads(1)
        self.seed, folder = made.seed, locate(made.pipeline)
        unused = ("unet", "text_encoder", "safety_checker", "feature_extractor")
        pipeline = StableDiffusionPipeline.from_pretrained(
            folder, use_safetensors=True, dtype=torch.float32, **dict.fromkeys(unused)
        )
        self.vae, self.tokenizer = pipeline.vae.eval().requires_grad_(False), pipeline.tokenizer
        self.latent_side = UNet2DConditionModel.load_config(folder, subfolder="unet")["sample_size"]
        self.size = self.latent_side * pipeline.vae_scale_factor
        self.seen = object_condition.load(made.image_encoder, "pooled").size

    def __call__(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        table = pyarrow.parquet.read_table(row["path"])
        pictures = table.to_pylist()
        make = self._domain if row["domain"] else self._general
        return [make(pictures, number, index) for number, index in json.loads(row["jobs"])]

    def _domain(self, pictures: list[dict[str, Any]], number: int, index: int) -> dict[str, Any]:
        own = pictures[number]
        generator = seeds.generator(self.seed, index, "object pair")
        others = [i for i, p in enumerate(pictures) if p["identity"] == own["identity"] and i != number]
        image, mask = _decoded(own)
        if others:
            chosen = others[int(torch.randint(len(others), (), generator=generator))]
            shown = _decoded(pictures[chosen])
        else:
            shown = framing.disturbed(image, mask, generator)
        reference = framing.cut_out(*shown, framing.fill(generator), self.seen)
        target, covered = framing.around(image, mask, self.size)
        cells = F.adaptive_avg_pool2d(covered[None], self.latent_side)
        return self._row(index, own[CAPTION], target, cells, reference)

    def _general(self, pictures: list[dict[str, Any]], number: int, index: int) -> dict[str, Any]:
        image = uploads.picture(pictures[number][IMAGE]).image
        target, _ = framing.around(image, torch.ones_like(image[:1]), self.size)
        nothing = torch.zeros(1, self.latent_side, self.latent_side)
        return self._row(index, pictures[number][CAPTION], target, nothing, None)

    @torch.no_grad()
    def _row(self, index: int, caption: str, target: Tensor, cells: Tensor, reference: Tensor | None) -> dict[str, Any]:
        shown = torch.zeros(3, self.seen, self.seen) if reference is None else reference
        return {
            "index": index,
            "prompt": caption,
            "input_ids": tokenize(self.tokenizer, [caption])[0].numpy().astype(np.int32),
            "latents": encode(self.vae, target[None]).flatten().numpy().astype(np.float16),
            "domain": reference is not None,
            "mask": cells.flatten().numpy().astype(np.float16),
            "reference": (shown * 255).round().to(torch.uint8).flatten().numpy(),
        }


def pair(
    described: Path,
    general: Path | None,
    out: Path,
    made: Made,
    *,
    domain_share: float = 0.5,
    repeats: int = 4,
    num_actors: int = 1,
) -> Paired:
    """Write rows in order of their index to `out`; needs a running Ray.

    Every described picture is a target `repeats` times, but for what the share of domain rows leaves over; general
    pictures are taken in turn. Raises ValueError where there are none of a kind that the share asks for.
    """
    for source in filter(None, (described, general)):
        if source.resolve().is_relative_to(out.resolve()):
            raise ValueError(f"{out}: what is in it goes, and {source} is in it; allowed: another --out")
    parts = files(described)
    if not parts:
        raise ValueError(
            f"{described}: nothing described in it; make it with: craftor objects describe SETTINGS --out {described}"
        )
    identities = {
        path: pyarrow.parquet.read_table(path, columns=["identity"])["identity"].to_pylist() for path in parts
    }
    others = sorted(general.glob("*.parquet")) if general else []
    if domain_share < 1 and not others:
        raise ValueError(
            f"domain_share = {domain_share} asks for pictures without an object, and {general or 'no --general'} has "
            f"no Parquet of {IMAGE} and {CAPTION}; with domain_share = 1 prompts lose what the base knew"
        )
    places = pattern(repeats * sum(map(len, identities.values())), domain_share)
    domain_at, general_at = (np.flatnonzero(kind) for kind in (places, ~places))
    lengths = {path: pyarrow.parquet.ParquetFile(path).metadata.num_rows for path in others}
    tasks = [
        *_tasks({path: len(ids) for path, ids in identities.items()}, domain_at, made.seed, domain=True),
        *_tasks(lengths, general_at, made.seed, domain=False),
    ]
    shutil.rmtree(out, ignore_errors=True)
    rows = ray.data.from_items(tasks, override_num_blocks=len(tasks)).flat_map(
        MakeRows,
        fn_constructor_args=(made,),
        compute=ray.data.ActorPoolStrategy(size=min(num_actors, len(tasks))),
    )
    rows.sort("index").write_parquet(str(out))
    pictures = Counter(identity for ids in identities.values() for identity in ids)
    alone = sum(count == 1 for count in pictures.values())
    return Paired(len(places), len(domain_at), len(pictures), alone)


def pattern(num_domain: int, share: float) -> Bool[np.ndarray, " rows"]:
    """Which rows have an object: evenly spread, at most `num_domain` of them, a whole number of the shortest period.

    Raises ValueError where even one period asks for more.
    """
    exact = Fraction(share).limit_denominator(100)
    periods = num_domain // exact.numerator
    if not periods:
        raise ValueError(
            f"{num_domain} rows with an object cannot be {share} of any; allowed: more pictures or repeats"
        )
    place = np.arange(periods * exact.denominator + 1)
    return np.diff(place * exact.numerator // exact.denominator) > 0


def _tasks(lengths: dict[Path, int], places: np.ndarray, seed: int, *, domain: bool) -> list[dict[str, Any]]:
    """The rows' places dealt out at random to pictures, each as often as any other; a task for each file."""
    every = [(path, number) for path, length in lengths.items() for number in range(length)]
    jobs: dict[Path, list[tuple[int, int]]] = {}
    dealt = np.random.default_rng(seed + domain).permutation(places)
    for turn, index in enumerate(dealt.tolist()):
        path, number = every[turn % len(every)]
        jobs.setdefault(path, []).append((number, index))
    return [{"path": str(path.resolve()), "domain": domain, "jobs": json.dumps(own)} for path, own in jobs.items()]


def _decoded(row: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return uploads.picture(row["image"]).image, uploads.mask(row["mask"])
