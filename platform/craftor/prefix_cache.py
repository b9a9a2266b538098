"""A recipe's prefixes as Parquet: computed once, read by every run that shares them, whatever its rewards and rates.

`prefix.json` holds what the prefixes depend on; a recipe whose answer differs in anything is refused. Each
`part-000000.parquet` holds the samples of some whole optimiser steps in order, and is renamed into place when complete,
so filling goes on where it was interrupted.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import ray.data
import torch
from rich.progress import track

from craftor.diffuser import Diffuser
from craftor.precision import NAMES
from craftor.prefix import PrefixActor
from craftor.prompts import Prepared
from craftor.recipe import Recipe, RewardTuning
from craftor.stage import ReadShare, opened
from craftor.stream import slots

MANIFEST = "prefix.json"
SAMPLES_PER_PART = 1024
NOISE = (
    "num_train_timesteps",
    "beta_schedule",
    "beta_start",
    "beta_end",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
)
"""Of a model's scheduler, what its latents depend on."""


def key(recipe: Recipe, diffuser: Diffuser, digest: str) -> dict[str, Any]:
    """What a prefix depends on, besides how far it goes; `digest` is that of the prompts in order."""
    assert isinstance(recipe.task, RewardTuning)
    return {
        "unet_sha256": weights_digest([diffuser.unet]),
        "text_encoders_sha256": weights_digest(diffuser.encoders.values()),
        "noise": {name: diffuser.scheduler.config[name] for name in NOISE},
        "prompts_sha256": digest,
        "seed": recipe.seed,
        "precision": NAMES[diffuser.precision],
        "rollout": recipe.task.rollout.model_dump(),
    }


def weights_digest(modules: Iterable[torch.nn.Module]) -> str:
    """sha256 over names, shapes and values of modules' weights."""
    digest = hashlib.sha256()
    for module in modules:
        for name, value in sorted(module.state_dict().items()):
            digest.update(f"{name}{tuple(value.shape)}".encode())
            digest.update(value.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def fill(recipe: Recipe, rows: Prepared, made_from: dict[str, Any], url: str, num_actors: int) -> int:
    """Compute the parts that a cache lacks; returns how many samples it holds then.

    Raises ValueError where `url` holds prefixes made from something else.
    """
    assert isinstance(recipe.task, RewardTuning)
    stop = recipe.task.window.span(recipe.task.rollout.num_steps).start
    return fill_several(recipe, rows, made_from, {stop: url}, num_actors, SAMPLES_PER_PART)


def fill_several(
    recipe: Recipe,
    rows: Prepared,
    made_from: dict[str, Any],
    urls: Mapping[int, str],
    num_actors: int,
    samples_per_part: int,
) -> int:
    """The same for caches that reach different denoising steps, all in one pass over the samples."""
    assert isinstance(recipe.task, RewardTuning)
    steps_per_part = max(1, samples_per_part // recipe.run.batch_size)
    for stop, url in urls.items():
        _write_manifest(recipe, made_from, url, stop, steps_per_part)
    parts = range(-(-recipe.run.num_steps // steps_per_part))
    missing = [part for part in parts if not all(_has_part(url, part) for url in urls.values())]
    if missing:
        done = (
            ray.data.from_items([{"part": part} for part in missing], override_num_blocks=len(missing))
            .map_batches(
                Fill,
                fn_constructor_args=(
                    recipe.model_dump(by_alias=True),
                    str(rows.folder),
                    rows.num_rows,
                    dict(urls),
                    steps_per_part,
                ),
                compute=ray.data.ActorPoolStrategy(size=min(num_actors, len(missing))),
                batch_size=1,
                num_gpus=recipe.task.prefix.gpus_per_actor,
            )
            .iter_rows()
        )
        for _ in track(done, description=f"prefixes, parts of {steps_per_part} steps", total=len(missing)):
            pass
    return recipe.run.num_steps * recipe.run.batch_size


def _write_manifest(recipe: Recipe, made_from: dict[str, Any], url: str, stop: int, steps_per_part: int) -> None:
    filesystem, folder = fsspec.core.url_to_fs(url)
    filesystem.makedirs(folder, exist_ok=True)
    manifest = {"key": made_from, "stop": stop, "steps_per_part": steps_per_part, "batch_size": recipe.run.batch_size}
    if filesystem.exists(f"{folder}/{MANIFEST}"):
        found = read_manifest(url)
        if {**found, "num_steps": 0} != {**manifest, "num_steps": 0}:
            raise ValueError(f"{url}: holds prefixes made from something else: {differences(found, manifest)}")
    with filesystem.open(f"{folder}/{MANIFEST}", "w") as file:
        json.dump({**manifest, "num_steps": recipe.run.num_steps}, file, indent=2)


def _has_part(url: str, part: int) -> bool:
    filesystem, folder = fsspec.core.url_to_fs(url)
    return filesystem.exists(f"{folder}/{part_name(part)}")


class Fill:
    """An actor: a part's number -> its file in each cache, in batches of one worker's share."""

    def __init__(
        self, recipe: dict[str, Any], rows: str, num_rows: int, urls: dict[int, str], steps_per_part: int
    ) -> None:
        self.recipe = Recipe.model_validate(recipe)
        self.prefix = PrefixActor(recipe)
        self.rows, self.num_rows, self.urls, self.steps_per_part = rows, num_rows, urls, steps_per_part

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        (part,) = (int(p) for p in batch["part"])
        run, num_workers = self.recipe.run, self.recipe.workers.most
        reader = ReadShare(self.rows, self.num_rows, run.batch_size, 0, run.batch_size, 0)
        columns: dict[int, list[dict[str, np.ndarray]]] = {stop: [] for stop in self.urls}
        for step in range(part * self.steps_per_part, min((part + 1) * self.steps_per_part, run.num_steps)):
            # Each share of a step is a batch of its own, as the workers will read it.
            for rank in range(num_workers):
                own = slots(run.batch_size, rank, num_workers)
                first = step * run.batch_size
                rows = opened(reader.read(range(first + own.start, first + own.stop)))
                found = self.prefix.passing({**rows.columns, "position": np.array(rows.position)}, list(self.urls))
                for stop, rows_there in found.items():
                    columns[stop].append(rows_there)
        for stop, url in self.urls.items():
            _write_part(url, part, columns[stop])
        return batch


def _write_part(url: str, part: int, columns: list[dict[str, np.ndarray]]) -> None:
    table = pyarrow.table({name: list(np.concatenate([c[name] for c in columns])) for name in columns[0]})
    table = table.set_column(table.column_names.index("index"), "index", table["position"])
    filesystem, folder = fsspec.core.url_to_fs(url)
    temporary = f"{folder}/.writing-{part_name(part)}"
    with filesystem.open(temporary, "wb") as file:
        pyarrow.parquet.write_table(table.drop_columns(["position"]), file, row_group_size=256)
    filesystem.mv(temporary, f"{folder}/{part_name(part)}")


def part_name(part: int) -> str:
    return f"part-{part:06d}.parquet"


def read_manifest(url: str) -> dict[str, Any]:
    """Raises ValueError where there is no cache."""
    filesystem, folder = fsspec.core.url_to_fs(url)
    if not filesystem.exists(f"{folder}/{MANIFEST}"):
        raise ValueError(
            f"task.prefix.cache = {url!r}: no {MANIFEST} there; fill it with: craftor prefix RECIPE --out {url}"
        )
    with filesystem.open(f"{folder}/{MANIFEST}") as file:
        return json.load(file)


def open_cache(recipe: Recipe, made_from: dict[str, Any]) -> Prepared:
    """The rows of a recipe's cache. Raises ValueError naming what differs in its making, or that it is short."""
    assert isinstance(recipe.task, RewardTuning) and recipe.task.prefix.cache is not None
    url = recipe.task.prefix.cache
    manifest = read_manifest(url)
    start = recipe.task.window.span(recipe.task.rollout.num_steps).start
    if manifest["key"] != made_from:
        raise ValueError(
            f"task.prefix.cache = {url!r}: made from something else: {differences(manifest['key'], made_from)}"
        )
    if manifest["stop"] > start:
        raise ValueError(
            f"task.prefix.cache = {url!r}: reaches denoising step {manifest['stop']}, but the window starts at {start}"
        )
    parts = -(-manifest["num_steps"] // manifest["steps_per_part"])
    whole = all(_has_part(url, part) for part in range(parts))
    num_rows = manifest["num_steps"] * manifest["batch_size"]
    needed = recipe.run.num_steps * recipe.run.batch_size
    if not whole or num_rows < needed:
        raise ValueError(
            f"task.prefix.cache = {url!r}: holds {num_rows if whole else 'only some'} of the {needed} samples needed; "
            f"go on with: craftor prefix RECIPE --out {url}"
        )
    return Prepared(url, num_rows, made_from["prompts_sha256"])


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """`name: found, wanted` for each entry that differs."""
    names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    return "; ".join(f"{name}: there {found.get(name)}, here {wanted.get(name)}" for name in names)
