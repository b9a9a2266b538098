"""A recipe with `[search]` -> trials on Ray Tune -> the best encoders, registered with what they were chosen by.

`OUT/` holds `recipe.toml`, `study.db` (every trial), `search.json` (MLflow id, seconds), what trials share (`rows/`,
`prefix/`, `judge/`), a run folder for each trial under `trials/`, and at the end `report.html` with its plots.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
from mlflow.exceptions import MlflowException
from ray import tune

from craftor import checkpoint, registry, tracking
from craftor.cluster import ray_session
from craftor.diffuser import load as load_diffuser
from craftor.locate import absolute
from craftor.recipe import Recipe, RecipeError, Register, load
from craftor.run_files import write_json
from craftor.searching.inputs import Shared, check, most_steps, prepare
from craftor.searching.outcome import reason, require_front
from craftor.searching.report import write_search_report
from craftor.searching.settings import Value, get
from craftor.searching.study import Study, Tried
from craftor.searching.table import TrialTable
from craftor.searching.tracking import RUN, Children
from craftor.searching.trial import run_trial
from craftor.searching.tuning import ERROR, message, trial_folder, tuned

CHAMPION = "champion"
NOTE = "search.json"


@dataclass(frozen=True)
class Found:
    """What a search leaves."""

    folder: Path
    trials: list[Tried]
    front: list[Tried]
    """The winner first; more than one only with several objectives."""
    registered: list[dict[str, str]]
    pages: list[Path]


def search(recipe: Recipe, source: Path, out: Path) -> Found:
    """Start a new search in an empty or missing folder. `source` is the recipe file, for error messages."""
    check(recipe, source)
    if out.exists() and any(out.iterdir()):
        raise RecipeError(f"{out}: not empty; choose another --out, or go on by: craftor search --resume {out}")
    connected = tracking.client(out.parent)  # an unreachable server says so before anything is written
    out.mkdir(parents=True, exist_ok=True)
    recipe = absolute(recipe)
    (out / "recipe.toml").write_text(tomli_w.dumps(recipe.data_of()))
    return _run(recipe, out, connected)


def resume(out: Path) -> Found:
    """Go on with a search however it ended: ended trials stay as they are, others go on from their checkpoints."""
    if not (out / "recipe.toml").is_file():
        raise RecipeError(f"{out}: no search to resume there (no recipe.toml)")
    recipe = load(out / "recipe.toml")
    check(recipe, out / "recipe.toml")
    return _run(recipe, out, tracking.client(out.parent))


def _run(recipe: Recipe, out: Path, connected: Any) -> Found:
    assert recipe.search is not None
    started = time.monotonic()
    with ray_session(recipe.search.concurrent * recipe.num_processes):
        shared = prepare(recipe, out)
        if missing := [metric for metric in recipe.search.metrics if metric not in shared.base]:
            raise RecipeError(f"{out / 'recipe.toml'}: search: no prompt of {recipe.search.prompts} has {missing[0]}")
        parent = _parent(connected, shared)
        space = recipe.search_space
        study = Study(
            out / "study.db",
            recipe.search,
            space,
            seed=recipe.seed,
            num_trials=recipe.search.num_trials,
            starts=[own] if (own := _own_values(recipe)) else [],
        )
        children = Children(connected, parent, study, shared)
        table = TrialTable(recipe.search, list(space), study.num_trials)
        tuned(
            tune.with_resources(run_trial, {"CPU": 0.01}),  # it waits for its Ray Train run, whose workers compute
            study,
            table,
            out,
            base=shared.base,
            prepare=lambda trial: _begin(shared, trial),
            concurrent=recipe.search.concurrent,
            num_steps=most_steps(recipe),
            on_end=children.try_send,
        )
    note = json.loads((out / NOTE).read_text())
    write_json(out / NOTE, {**note, "seconds": note["seconds"] + time.monotonic() - started})
    return _conclude(shared, study, children)


def _parent(connected: Any, shared: Shared) -> tracking.Tracker:
    """The search's run in MLflow, the same after an interruption."""
    path = shared.folder / NOTE
    if path.exists():
        return tracking.Tracker(connected, json.loads(path.read_text())["mlflow_run_id"])
    parent = tracking.Tracker.start(connected, shared.recipe, shared.prepared)
    write_json(path, {"mlflow_run_id": parent.run_id, "seconds": 0.0, "prefix_seconds": shared.prefix_seconds})
    return parent


def _own_values(recipe: Recipe) -> dict[str, Value] | None:
    """The recipe's own values, if it has all: the first trial shows what the search is worth."""
    data = recipe.data_of()
    values = {key: get(data, key.split(".")) for key in recipe.search_space}
    return None if any(value is None for value in values.values()) else values


def _begin(shared: Shared, trial: Tried) -> dict[str, Any]:
    """Write a trial's recipe into its folder; returns what its function is called with."""
    assert shared.recipe.search is not None
    folder = trial_folder(shared.folder, trial.number)
    recipe, rows = shared.trial(trial.values)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.toml").write_text(tomli_w.dumps(recipe.data_of()))
    return {
        "folder": str(folder.resolve()),
        "probe": shared.probe,
        "resources": shared.recipe.search.resources,
        "num_steps": recipe.run.num_steps,
        **rows,
    }


def _conclude(shared: Shared, study: Study, children: Children) -> Found:
    """Report, then register: a search that found nothing still shows what it tried."""
    search, trials = study.search, study.trials()
    errors = {t.number: _error(shared.folder, t.number) for t in trials if t.state == "failed"}
    pages = write_search_report(shared.folder, shared.recipe, trials, shared.base, errors, study)
    try:
        for trial in trials:
            children.send(trial.number)
        with children.parent.reachable():
            for page in pages:
                children.parent.artifacts(page, "search")
        winners = require_front(trials, search, list(errors.values()), shared.folder)
        with children.parent.reachable():
            registered = [_register(shared, children, trial, champion=trial is winners[0]) for trial in winners]
            best = winners[0].scores
            children.parent.figures({f"search/{metric}": best[metric] for metric in search.metrics})
            children.parent.finish()
    except (tracking.TrackingUnreachable, MlflowException) as error:
        raise tracking.TrackingUnreachable(
            f"{str(error).splitlines()[0]}; nothing is lost. Later: craftor search --resume {shared.folder}"
        ) from None
    return Found(shared.folder, trials, winners, registered, pages)


def _register(shared: Shared, children: Children, trial: Tried, *, champion: bool) -> dict[str, str]:
    """A trial's encoder in the registry, once; tags say what it was chosen by."""
    folder, search = trial_folder(shared.folder, trial.number), shared.recipe.search
    assert search is not None
    note = json.loads((folder / RUN).read_text())
    if "registered" not in note:
        last = checkpoint.latest(folder)
        assert last is not None
        name = (shared.recipe.register_as or Register(name=shared.recipe.name)).name
        named = Register(name=name, aliases=(CHAMPION,) if champion else ())
        recipe = load(folder / "recipe.toml").model_copy(update={"register_as": named})
        bundle = registry.write_bundle(recipe, load_diffuser(recipe.model), last, folder / "bundle")
        tracker = tracking.Tracker(children.client, note["mlflow_run_id"])
        note["registered"] = registry.register(children.client, tracker, recipe, bundle, recipe.run.num_steps)
        tags = {
            "craftor.search": shared.folder.name,
            "craftor.trial": str(trial.number),
            "craftor.chosen_by": reason(search),
            **{f"craftor.searching.search.{metric}": f"{trial.scores[metric]:.6g}" for metric in search.metrics},
        }
        for key, value in tags.items():
            children.client.set_model_version_tag(name, note["registered"]["version"], key, value)
        write_json(folder / RUN, note)
    return note["registered"]


def _error(folder: Path, number: int) -> str:
    path = trial_folder(folder, number) / ERROR
    return message(path.read_text()) if path.exists() else "unknown"
