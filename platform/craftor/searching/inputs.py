"""What all trials of a search share, made once: rows, prefixes up to each window's first step, the base's scores."""

import itertools
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from pydantic import ValidationError

from craftor import held_out, inputs, preflight, prompts
from craftor.diffuser import Diffuser
from craftor.diffuser import load as load_diffuser
from craftor.explain import explain
from craftor.prefix_cache import SAMPLES_PER_PART, fill_several, key
from craftor.prompts import Prepared
from craftor.recipe import Recipe, RecipeError, RewardTuning
from craftor.run_files import write_json
from craftor.searching.judge import BASE, judge_base, search_prompts
from craftor.searching.settings import MEASURED, Value


@dataclass(frozen=True)
class Shared:
    recipe: Recipe
    folder: Path
    prepared: Prepared
    caches: dict[int, str]
    """Prefix caches by the denoising step they reach; none where each trial computes its own."""
    num_cached: int
    prefix_seconds: float
    """What filling the caches took in this session."""

    @property
    def base(self) -> dict[str, float]:
        """The base model's scores on the search's prompts."""
        return json.loads((self.folder / "judge" / BASE).read_text())["scores"]

    @property
    def probe(self) -> dict[str, Any]:
        return {"recipe": self.recipe.data_of(), "folder": str((self.folder / "judge").resolve())}

    def trial(self, values: Mapping[str, Value]) -> tuple[Recipe, dict[str, Any]]:
        """A trial's recipe, and where its rows are."""
        recipe = self.recipe.with_values(values)
        rows: dict[str, Any] = {"rows": str(self.prepared.folder), "num_rows": self.prepared.num_rows}
        if self.caches:
            assert isinstance(recipe.task, RewardTuning)
            cache = self.caches[recipe.task.window.span(recipe.task.rollout.num_steps).start]
            recipe = self.recipe.with_values({**values, "task.prefix.mode": "cache", "task.prefix.cache": cache})
            rows = {"rows": cache, "num_rows": self.num_cached}
        return recipe, rows


def check(recipe: Recipe, source: Path) -> None:
    """Raise RecipeError for a search that cannot start, before a model loads or a cluster starts."""
    preflight.check(recipe, source)
    search = recipe.search
    if search is None:
        raise RecipeError(f"{source}: has no [search] section")
    try:
        rows = search_prompts(search)
        read = [metric for metric in search.metrics if metric in MEASURED and metric != "diversity"]
        if read and not all(row.get("description") for row in rows):
            raise ValueError(f"search: {read[0]} is read against descriptions, which {search.prompts} lacks")
        if recipe.evaluation is not None:
            kept = {row["prompt"] for row in held_out.read("evaluation", recipe.evaluation.prompts)}
            if both := [row["prompt"] for row in rows if row["prompt"] in kept]:
                raise ValueError(f"search.prompts: {len(both)} of them are held out in [evaluation]: {both[0]!r}")
        if search.share_prefix:
            _starts(recipe)
    except ValueError as error:
        raise RecipeError(f"{source}: {error}") from None


def prepare(recipe: Recipe, folder: Path) -> Shared:
    """Make what is not there yet; may be called again after an interruption."""
    assert isinstance(recipe.task, RewardTuning) and recipe.search is not None
    search, concurrent = recipe.search, recipe.search.concurrent * recipe.workers.most
    starts = _starts(recipe) if search.share_prefix else [0]
    judged = []
    if not (folder / "judge" / BASE).exists():
        # On a worker's device, beside the prefixes.
        begin = ray.remote(num_cpus=1, num_gpus=int(recipe.workers.gpu))(judge_base)
        where = str((folder / "judge").resolve())
        judged.append(begin.remote(recipe.model_dump(by_alias=True), where, min(starts)))
    diffuser = load_diffuser(recipe.model)
    prepared = _rows(recipe, diffuser, folder)
    caches = {stop: str((folder / "prefix" / f"to-{stop}").resolve()) for stop in starts} if search.share_prefix else {}
    num_cached, started = 0, time.monotonic()
    if caches:
        longest = recipe.with_values({"run.num_steps": most_steps(recipe)})
        made_from = key(recipe, diffuser, prepared.digest)
        # Short caches are cut for all actors to have a part in them.
        share = -(-longest.run.num_steps // concurrent) * longest.run.batch_size
        parts = min(SAMPLES_PER_PART, share)
        num_cached = fill_several(longest, prepared, made_from, caches, concurrent, parts)
    filled = time.monotonic() - started
    ray.get(judged)
    return Shared(recipe, folder, prepared, caches, num_cached, filled)


def _rows(recipe: Recipe, diffuser: Diffuser, folder: Path) -> Prepared:
    """The prompts' rows; those a search began with must still be there."""
    note = folder / "rows.json"
    if not note.exists():
        prepared = inputs.rows_of(recipe, diffuser, folder)
        write_json(note, {"digest": prepared.digest})
        return prepared
    prepared, digest = prompts.describe(folder / "rows"), json.loads(note.read_text())["digest"]
    if prepared.digest != digest:
        raise RecipeError(f"{folder / 'rows'}: sha256 {prepared.digest[:16]}, but the search began with {digest[:16]}")
    return prepared


def _starts(recipe: Recipe) -> list[int]:
    """The denoising steps at which trials' windows begin. Raises ValueError where prefixes cannot be shared."""
    space = recipe.search_space
    own = "their prefixes are not the same; set search.share_prefix = false"
    for name in ("data", "run.batch_size", "workers", "task.train"):
        if changed := [found for found in space if found == name or found.startswith(f"{name}.")]:
            raise ValueError(f"search.share_prefix = true: trials differ in {changed[0]}, so {own}")
    windows = {found: space[found].values for found in space if found.startswith("task.window.")}
    if endless := [found for found, values in windows.items() if values is None]:
        raise ValueError(f"search.share_prefix = true: {endless[0]} has no list of values; set it to false")
    starts = set()
    for values in itertools.product(*(values or () for values in windows.values())):
        drawn = dict(zip(windows, values, strict=True))
        try:
            trial = recipe.with_values({**drawn, "task.prefix.mode": "cache", "task.prefix.cache": "shared"})
        except ValidationError as error:
            raise ValueError(f"search.space: {drawn}: {explain(error.errors()[0], Recipe)}") from None
        assert isinstance(trial.task, RewardTuning)
        starts.add(trial.task.window.span(trial.task.rollout.num_steps).start)
    return sorted(starts)


def most_steps(recipe: Recipe) -> int:
    steps = recipe.search_space.get("run.num_steps")
    return max([recipe.run.num_steps, *(int(end) for end in (steps.ends if steps else ()))])
