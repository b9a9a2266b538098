"""A recipe's prefixes as Parquet: computed once, read by every run that shares them, whatever its rewards and rates.

`prefix.json` holds what the prefixes depend on; a recipe whose answer differs in anything is refused. Each
`part-000000.parquet` holds the samples of some whole optimiser steps in order, and is renamed into place when complete,
so filling goes on where it was interrupted. The last one is short, until a recipe of more steps has the cache grow.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import ray.data
import torch
from rich.progress import track

from craftor import prefix_parts, storage
from craftor.diffuser import Diffuser
from craftor.precision import NAMES
from craftor.prefix_parts import Fill
from craftor.prompts import Prepared
from craftor.recipe import Recipe, RewardTuning

MANIFEST, ROWS = "prefix.json", ".filling"
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
    steps_per_part = max(1, samples_per_part // recipe.run.batch_size)
    manifests = {url: _manifest(recipe, made_from, url, stop, steps_per_part) for stop, url in urls.items()}
    # All that a longer recipe began is filled: parts beyond a shorter one's may be there already, behind a gap.
    num_steps = max(manifest["num_steps"] for manifest in manifests.values())
    recipe = recipe.with_values({"run.num_steps": num_steps})
    assert isinstance(recipe.task, RewardTuning)
    missing: set[int] = set()
    for url, manifest in manifests.items():
        manifest["num_steps"] = num_steps
        _write_manifest(manifest, url)
        missing.update(prefix_parts.missing(manifest, url))
    if missing:
        with _beside(next(iter(manifests)), rows) as folder:
            done = (
                ray.data.from_items([{"part": part} for part in sorted(missing)], override_num_blocks=len(missing))
                .map_batches(
                    Fill,
                    fn_constructor_args=(
                        recipe.model_dump(by_alias=True),
                        folder,
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
    return num_steps * recipe.run.batch_size


def _manifest(recipe: Recipe, made_from: dict[str, Any], url: str, stop: int, steps_per_part: int) -> dict[str, Any]:
    """Of a cache that serves the recipe and whatever it was begun for. Raises ValueError where they do not agree."""
    run = recipe.run
    manifest = {"key": made_from, "stop": stop, "steps_per_part": steps_per_part, "batch_size": run.batch_size}
    filesystem, folder = fsspec.core.url_to_fs(url)
    if not filesystem.exists(f"{folder}/{MANIFEST}"):
        return {**manifest, "num_steps": run.num_steps}
    found = read_manifest(url)
    num_steps = found.pop("num_steps")
    if found != manifest:
        raise ValueError(f"{url}: holds prefixes made from something else: {differences(found, manifest)}")
    return {**manifest, "num_steps": max(num_steps, run.num_steps)}


def _write_manifest(manifest: dict[str, Any], url: str) -> None:
    filesystem, folder = fsspec.core.url_to_fs(url)
    filesystem.makedirs(folder, exist_ok=True)
    with filesystem.open(f"{folder}/{MANIFEST}", "w") as file:
        json.dump(manifest, file, indent=2)


@contextmanager
def _beside(url: str, rows: Prepared) -> Iterator[str]:
    """The rows in a folder of the cache for the time of the block: all actors reach it, but not the driver's disk."""
    assert isinstance(rows.folder, Path)
    beside = f"{url.rstrip('/')}/{ROWS}"
    filesystem, folder = fsspec.core.url_to_fs(beside)
    if filesystem.exists(folder):  # an interrupted filling's
        filesystem.rm(folder, recursive=True)
    storage.put(rows.folder, beside)
    try:
        yield beside
    finally:
        filesystem.rm(folder, recursive=True)


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
    whole = not prefix_parts.missing(manifest, url)
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
