"""The whole idea on one machine: train, register, evaluate on held-out prompts, report."""

import json
import os
import platform
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import psutil

from craftor import checkpoint, registry
from craftor.cluster import ray_session
from craftor.evaluate import Asked, Tuned, evaluate, used_steps
from craftor.job import Trained, check_new, train
from craftor.locate import shipped_recipe
from craftor.memory import peak_memory
from craftor.recipe import Recipe, RecipeError, Tuning, load, load_run
from craftor.report import write_report
from craftor.run_files import write_json
from craftor.tracking import Tracker, client

STYLE, ALIGNMENT = "micro_textcraftor.toml", "micro_alignment.toml"
_OF_BOTH = ("model", "run", "seed", "workers")
"""Sections of which overrides are for both recipes; of all others, for the first alone."""


def quickstart(out: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    """Tune one encoder for the late denoising steps and one for the early ones, and report on their mixture.

    The first run is `out`, with `report.json`, `report.html` and `report.png`; the second is beside it.
    """
    common = {key: value for key, value in overrides.items() if key.split(".")[0] in _OF_BOTH}
    runs = {STYLE: (out, overrides), ALIGNMENT: (out.with_name(f"{out.name}-alignment"), common)}
    recipes = {name: load(shipped_recipe(name), changes) for name, (_, changes) in runs.items()}
    for name, (folder, _) in runs.items():
        check_new(recipes[name], shipped_recipe(name), folder)
    first = recipes[STYLE]
    with peak_memory() as peak, ray_session(max(recipe.num_processes for recipe in recipes.values())):
        trained = [train(recipes[name], shipped_recipe(name), folder) for name, (folder, _) in runs.items()]
        folders = [run.run_dir for run in trained]
        # The first costs little by itself, for it shares all but its last steps with the base.
        summary = evaluate_runs(folders, out / "evaluation", first.workers.most, alone=folders[:1])
    return finish(trained, summary, peak.gib, "craftor quickstart")


def evaluate_runs(
    runs: Sequence[Path], out: Path, num_actors: int, asked: Asked | None = None, alone: Collection[Path] = ()
) -> dict[str, Any]:
    """Evaluate the mixture of the runs' encoders, each in its own window, by the first run's evaluation section.

    Those of `alone` are also evaluated by themselves: under their recipes' names in the summary's `methods`.
    """
    tuned, variants, first = [], {}, None
    for run in runs:
        recipe = load_run(run)
        first = first or recipe
        assert isinstance(recipe.task, Tuning)
        if recipe.evaluation is None:
            raise RecipeError(f"{run / 'recipe.toml'}: has no [evaluation] section")
        last = checkpoint.latest(run)
        if last is None:
            raise RecipeError(f"{run}: no complete checkpoint to evaluate")
        tuned.append(Tuned(str(last.resolve()), recipe.evaluation.weight, used_steps(recipe)))
        if run in alone:
            variants[recipe.name] = tuned[-1:]
    assert first is not None
    with ray_session(num_actors):
        return evaluate(first, tuned, out, num_actors, asked, variants)


def finish(trained: Sequence[Trained], summary: dict[str, Any], peak_gib: float, command: str) -> dict[str, Any]:
    """Write `report.json` into the first run, and the two renderings of it; the run's own scores go to the registry."""
    out = trained[0].run_dir
    recipes = [load_run(run.run_dir) for run in trained]
    evaluation = recipes[0].evaluation
    assert evaluation is not None
    own = summary.pop("methods")[recipes[0].name]
    report = {
        "name": recipes[0].name,
        **summary,
        "alone": own,
        "registered": trained[0].registered,
        "train_seconds": round(sum(run.train_seconds for run in trained), 1),
        "mixture": [_ingredient(recipe, run, out) for recipe, run in zip(recipes, trained, strict=True)],
        "peak_rss_gib": round(peak_gib, 2),
        "num_prompts": evaluation.num_prompts,
        "num_seeds": evaluation.num_seeds,
        "machine": machine(),
        "command": command,
    }
    write_json(out / "report.json", report)
    pages = write_report(out)
    tracker = Tracker(client(out.parent), json.loads((out / "run.json").read_text())["mlflow_run_id"])
    with tracker.reachable():
        for path in (*pages, out / "report.json", out / "evaluation" / "images.jsonl"):
            tracker.artifacts(path, "evaluation")
        tracker.artifacts(out / "evaluation" / "samples", "evaluation/samples")
    record(out, own)
    return report


def _ingredient(recipe: Recipe, run: Trained, first: Path) -> dict[str, Any]:
    """An encoder of the mixture: its run as seen from the first, where it acts, and what training it took."""
    assert recipe.evaluation is not None
    return {
        "name": recipe.name,
        "run": os.path.relpath(run.run_dir, first),
        "registered": run.registered,
        "weight": recipe.evaluation.weight,
        "steps": list(used_steps(recipe)),
        "optimiser_steps": recipe.run.num_steps,
        "seconds": round(run.train_seconds, 1),
    }


def record(run: Path, metrics: dict[str, dict[str, Any]]) -> None:
    """Give held-out scores to the run in MLflow, and to the version of the encoder that it registered."""
    state = json.loads((run / "run.json").read_text())
    tracker = Tracker(client(run.parent), state["mlflow_run_id"])
    with tracker.reachable():
        tracker.scores(metrics)
        if "registered" in state:
            registry.score(tracker.client, state["registered"], metrics)


def machine() -> str:
    """Processor, cores and memory, for the figures to be read with."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return f"{model}, {psutil.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB"
