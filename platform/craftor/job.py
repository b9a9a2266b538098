"""One training run from recipe to registry: check, prepare, track, train, register; all it needs lies in its folder.

`RUN/` holds `recipe.toml` (resolved), `run.json` (MLflow ids, digest, times), `rows/`, `metrics.jsonl`, `checkpoints/`,
`bundle/` and, after evaluation, `evaluation/` and `report.*`.
"""

import json
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import tomli_w

from craftor import checkpoint, inputs, preflight, registry, storage, storage_checks, tracking, validation, watch
from craftor.cluster import alive_nodes, await_workers, ray_session
from craftor.console import follow
from craftor.diffuser import load as load_diffuser
from craftor.fit import TrainingStopped, fit
from craftor.interruption import Interrupted
from craftor.locate import absolute
from craftor.prompts import Prepared
from craftor.recipe import Recipe, RecipeError, load_run
from craftor.run_files import METRICS, notes, write_json


@dataclass(frozen=True)
class Trained:
    """What a finished run leaves."""

    run_dir: Path
    checkpoint: Path
    registered: dict[str, str] | None
    train_seconds: float


def train(recipe: Recipe, source: Path, run_dir: Path) -> Trained:
    """Start a new run in an empty or missing folder. `source` is the recipe file, for error messages."""
    preflight.check(recipe, source)
    if run_dir.exists() and any(run_dir.iterdir()):
        raise RecipeError(
            f"{source}: the output folder {run_dir} holds another run; choose a new one with --out, or go on with "
            f"that run by: craftor train --resume {run_dir}"
        )
    if recipe.run.storage is not None:
        storage_checks.refuse_if_used(recipe.run.storage)
    connected = tracking.client(run_dir.parent)
    run_dir.mkdir(parents=True, exist_ok=True)
    recipe = absolute(recipe)
    write_recipe(recipe, run_dir)
    with ray_session(recipe.num_processes):
        _check_cluster(recipe, run_dir)
        prepared = inputs.prepare(recipe, run_dir)
        if prepared.num_truncated:
            print(
                f"{prepared.num_truncated} of {prepared.num_rows} prompts are longer than the text encoder reads: "
                "their ends are cut (data.max_chars leaves them out)"
            )
        tracker = tracking.Tracker.start(connected, recipe, prepared)
        write_json(run_dir / "run.json", {"mlflow_run_id": tracker.run_id, "digest": prepared.digest, "seconds": 0.0})
        return _train(recipe, run_dir, prepared, tracker)


def resume(run_dir: Path, other: Recipe | None = None, accept: bool = False) -> Trained:
    """Go on with a run from its last complete checkpoint, however it ended.

    A run whose home is a URL goes on with what is there; its folder may be new. Where the `other` recipe differs from
    the run's own, RecipeError shows how, unless `accept` says to go on by it.
    """
    recipe = load_run(run_dir)
    if (url := recipe.run.storage) is not None:
        storage.get_run(url, run_dir)
        recipe = load_run(run_dir)
    if other is not None and (changed := tracking.differences(recipe, absolute(other))):
        if not accept:
            raise RecipeError(
                f"{run_dir} began with another recipe: {'; '.join(changed)}. Leave the recipe out to go on by its own, "
                "or add --accept to go on by this one"
            )
        recipe = absolute(other)
        write_recipe(recipe, run_dir)
    preflight.check(recipe, run_dir / "recipe.toml")
    connected = tracking.client(run_dir.parent)
    with ray_session(recipe.num_processes):
        _check_cluster(recipe, run_dir)
        if (run_dir / "run.json").is_file():
            state = json.loads((run_dir / "run.json").read_text())
            prepared = inputs.prepared_earlier(recipe, run_dir, state["digest"])
            tracker = tracking.Tracker.again(connected, state["mlflow_run_id"])
            if tracker is None:
                print("MLflow does not know this run: it gets a new one there")
        else:  # killed before training began
            prepared, state, tracker = inputs.prepare(recipe, run_dir), {"seconds": 0.0}, None
        if tracker is None:
            tracker = tracking.Tracker.start(connected, recipe, prepared)
            began = {"mlflow_run_id": tracker.run_id, "digest": prepared.digest, "seconds": state["seconds"]}
            write_json(run_dir / "run.json", began)
        return _train(recipe, run_dir, prepared, tracker)


def write_recipe(recipe: Recipe, run_dir: Path) -> None:
    (run_dir / "recipe.toml").write_text(
        tomli_w.dumps(recipe.model_dump(by_alias=True, exclude_none=True, mode="json"))
    )


def _train(recipe: Recipe, run_dir: Path, prepared: Prepared, tracker: tracking.Tracker) -> Trained:
    started = time.monotonic()
    done = _log_earlier_lines(run_dir, tracker)
    rows, heard = prepared.folder, len(notes(run_dir))
    if recipe.run.storage is not None:
        storage.put_run(run_dir, recipe.run.storage)
        if rows == run_dir / "rows":
            rows = f"{recipe.run.storage}/rows"
    try:
        with follow(run_dir / METRICS, recipe.run.num_steps, on_line=tracker.log, after=done):
            final = fit(recipe, run_dir, rows, prepared.num_rows)
        if recipe.validation is not None:
            validation.collect(recipe, run_dir)
        for said in notes(run_dir)[heard:]:
            print(f"note: {said}")
    except (TrainingStopped, Interrupted) as error:
        with suppress(tracking.TrackingUnreachable), tracker.reachable():  # what ended the run is to be heard
            tracker.finish("FAILED" if isinstance(error, TrainingStopped) else "KILLED")
        raise
    state = json.loads((run_dir / "run.json").read_text())
    state["seconds"] += time.monotonic() - started
    write_json(run_dir / "run.json", state)
    try:
        registered = _conclude(recipe, run_dir, final, tracker)
    except tracking.TrackingUnreachable as error:
        print(f"{error}; nothing is lost: the metrics are in {run_dir / METRICS}. Later: craftor sync {run_dir}")
        registered = None
    if recipe.run.storage is not None:
        storage.put_small(run_dir, recipe.run.storage)
    return Trained(run_dir, final, registered, state["seconds"])


def _check_cluster(recipe: Recipe, run_dir: Path) -> None:
    """Raises TooFewResources or StorageError; one node shares everything with itself."""
    await_workers(recipe.workers)
    if len(nodes := alive_nodes()) > 1:
        storage_checks.check_shared(recipe.run.storage or str(run_dir.resolve()), nodes)


def sync(run_dir: Path) -> Trained:
    """Send what MLflow missed during an outage and, of a run that has ended, register the encoder if that is due."""
    recipe = load_run(run_dir)
    state = json.loads((run_dir / "run.json").read_text())
    final = checkpoint.latest(run_dir)
    if final is None:
        raise RecipeError(f"{run_dir}: no complete checkpoint in it")
    connected = tracking.client(run_dir.parent)
    tracker = tracking.Tracker.again(connected, state["mlflow_run_id"])
    if tracker is None:
        raise RecipeError(
            f"{run_dir}: MLflow does not know this run; set MLFLOW_TRACKING_URI to where "
            f"it began, or let it begin there: craftor train --resume {run_dir}"
        )
    _log_earlier_lines(run_dir, tracker)
    if not _has_ended(recipe, run_dir, final):
        with tracker.reachable():
            return Trained(run_dir, final, None, state["seconds"])
    registered = _conclude(recipe, run_dir, final, tracker)
    return Trained(run_dir, final, registered, state["seconds"])


def _has_ended(recipe: Recipe, run_dir: Path, final: Path) -> bool:
    """By its last step, or by a guard that rolled it back; what a guard stopped may still go on."""
    ended = watch.ended(run_dir)
    if ended is not None:
        return ended["action"] == "roll_back"
    return checkpoint.step_of(final) == recipe.run.num_steps


def _conclude(recipe: Recipe, run_dir: Path, final: Path, tracker: tracking.Tracker) -> dict[str, str] | None:
    """Send what waits, the pictures and the encoder. Raises TrackingUnreachable; may be called again."""
    state = json.loads((run_dir / "run.json").read_text())
    registered = state.get("registered")
    with tracker.reachable():
        for found in validation.read(run_dir):
            means = {f"validation/{name}/{key}": v for name, row in found["metrics"].items() for key, v in row.items()}
            tracker.figures(means, found["step"])
        if (run_dir / "samples").is_dir():
            tracker.artifacts(run_dir / "samples", "samples")
        if recipe.register_as and registered is None:
            lineage = {"run_id": tracker.run_id, "dataset_sha256": state["digest"]}
            bundle = registry.write_bundle(recipe, load_diffuser(recipe.model), final, run_dir / "bundle", lineage)
            registered = registry.register(tracker.client, tracker, recipe, bundle, recipe.run.num_steps)
            write_json(run_dir / "run.json", {**state, "registered": registered})
        tracker.finish()
    return registered


def _log_earlier_lines(run_dir: Path, tracker: tracking.Tracker) -> int:
    """Give MLflow the steps up to the last checkpoint, should it lack any; returns that checkpoint's step.

    Later lines, perhaps torn by a kill, belong to steps that are done again, with the same values.
    """
    last = checkpoint.latest(run_dir)
    done = checkpoint.step_of(last) if last else 0
    if done:
        for line in (run_dir / METRICS).read_text().splitlines()[:done]:
            tracker.log(json.loads(line))
    return done
