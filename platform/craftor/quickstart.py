"""The whole idea on one machine: train, register, evaluate on held-out prompts, report."""

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from craftor import checkpoint, registry
from craftor.cluster import ray_session
from craftor.evaluate import Asked, Tuned, evaluate, used_steps
from craftor.job import Trained, train
from craftor.locate import shipped_recipe
from craftor.memory import peak_memory
from craftor.recipe import Evaluation, Recipe, RecipeError, Tuning, load, load_run
from craftor.report import write_report
from craftor.run_files import write_json
from craftor.tracking import Tracker, client

RECIPE = "micro_textcraftor.toml"


def quickstart(out: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    """Run the shipped recipe into `out` and write `report.json`, `report.html` and `report.png` there."""
    source = shipped_recipe(RECIPE)
    recipe = load(source, overrides)
    with peak_memory() as peak, ray_session(recipe.num_processes):
        trained = train(recipe, source, out)
        summary = evaluate_runs([out], out / "evaluation", recipe.workers.most)
    return finish(out, trained, summary, peak.gib, "craftor quickstart")


def evaluate_runs(runs: Sequence[Path], out: Path, num_actors: int, asked: Asked | None = None) -> dict[str, Any]:
    """Evaluate the mixture of the runs' encoders, each in its own window, by the first run's evaluation section."""
    tuned, first = [], None
    for run in runs:
        recipe = load_run(run)
        if not isinstance(recipe.task, Tuning):
            raise RecipeError(
                f"{run}: task.kind = {recipe.task.kind!r}; what is evaluated here is what was tuned by reward (object "
                "encoders: craftor objects gauge)"
            )
        if recipe.evaluation is None:
            recipe = _with_default_evaluation(recipe, run, asked)
            assert recipe.evaluation is not None
        last = checkpoint.latest(run)
        if last is None:
            raise RecipeError(f"{run}: no complete checkpoint to evaluate")
        first = first or recipe
        tuned.append(Tuned(str(last.resolve()), recipe.evaluation.weight, used_steps(recipe)))
    assert first is not None
    with ray_session(num_actors):
        return evaluate(first, tuned, out, num_actors, asked)


def _with_default_evaluation(recipe: Recipe, run: Path, asked: Asked | None) -> Recipe:
    """For a recipe that named no held-out prompts, where the command does."""
    prompts = asked and (asked.prompts or asked.suite)
    if not prompts:
        raise RecipeError(
            f"{run / 'recipe.toml'}: has no [evaluation] section, which names held-out prompts; name them here, by "
            "--prompts FILE.jsonl or --suite NAME"
        )
    return recipe.model_copy(update={"evaluation": Evaluation(prompts=prompts)})


def finish(out: Path, trained: Trained, summary: dict[str, Any], peak_gib: float, command: str) -> dict[str, Any]:
    """Write `report.json` and the two renderings of it."""
    recipe = load_run(out)
    assert recipe.evaluation is not None
    report = {
        "name": recipe.name,
        **summary,
        "registered": trained.registered,
        "train_seconds": round(trained.train_seconds, 1),
        "peak_rss_gib": round(peak_gib, 2),
        "num_prompts": recipe.evaluation.num_prompts,
        "num_seeds": recipe.evaluation.num_seeds,
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
    record(out, report["metrics"])
    return report


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
