"""The folder of a run that was trained elsewhere -> a run and a registered encoder of this store, scores included."""

import json
from collections.abc import Sequence
from pathlib import Path

from mlflow.tracking import MlflowClient

from craftor import checkpoint, prompts, registry
from craftor.diffuser import load as load_diffuser
from craftor.recipe import ObjectEncoder, Recipe, RecipeError, RewardTuning, Tuning
from craftor.recipe import load as load_recipe
from craftor.run_files import METRICS
from craftor.tracking import Tracker


def adopt(connected: MlflowClient, run_dir: Path, name: str | None, aliases: Sequence[str]) -> dict[str, str]:
    """Register a run's last checkpoint, by default under its recipe's name; returns `{"name", "version"}`.

    A run that this store does not know is entered into it first: recipe, dataset digest and every line of metrics.
    Raises RecipeError for a folder without a finished step.
    """
    recipe, last = load_recipe(run_dir / "recipe.toml"), checkpoint.latest(run_dir)
    if last is None or not isinstance(recipe.task, Tuning | ObjectEncoder):
        raise RecipeError(f"{run_dir}: no complete checkpoint of a tuned encoder in it")
    state = json.loads((run_dir / "run.json").read_text())
    bundle = run_dir / "bundle"
    if not bundle.is_dir():
        lineage = {"run_id": state["mlflow_run_id"], "dataset_sha256": state["digest"]}
        registry.write_bundle(recipe, load_diffuser(recipe.model), last, bundle, lineage)
    registry.verify_bundle(bundle)
    tracker = Tracker.again(connected, state["mlflow_run_id"]) or _enter(connected, recipe, run_dir, state)
    name = name or (recipe.register_as.name if recipe.register_as else recipe.name)
    model, registered = registry.add(connected, bundle, name, aliases, tracker.run_id)
    tracker.output(model, checkpoint.step_of(last))
    evaluation = run_dir / "evaluation" / "summary.json"
    if evaluation.is_file():
        metrics = json.loads(evaluation.read_text())["metrics"]
        tracker.scores(metrics)
        registry.score(connected, registered, metrics)
    return registered


def _enter(connected: MlflowClient, recipe: Recipe, run_dir: Path, state: dict) -> Tracker:
    rows = run_dir / "rows" if isinstance(recipe.task, RewardTuning) else Path(recipe.data.path)
    here = prompts.describe(rows)  # a data set elsewhere may not be, or be another
    tracker = Tracker.start(connected, recipe, here if here.digest == state["digest"] else None)
    connected.set_tag(tracker.run_id, "craftor.original_run", state["mlflow_run_id"])
    for line in (run_dir / METRICS).read_text().splitlines():
        tracker.log(json.loads(line))
    with tracker.reachable():
        tracker.finish()
    return tracker
