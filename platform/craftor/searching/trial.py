"""One trial: a function of Ray Tune that launches the Ray Train run of the trial's recipe and waits for it.

So Ray documents Train with Tune today: Tune's trial is the driver of a whole Train run, whose workers' reports reach
Tune through `TuneReportCallback`. The trial's folder is an ordinary run folder, so whatever interrupts the search,
`fit` goes on from the last checkpoint with the same bits.
"""

from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from craftor import checkpoint
from craftor.fit import TrainingStopped, fit
from craftor.quiet import hush
from craftor.recipe import load
from craftor.searching.probe import read


def run_trial(config: dict[str, Any]) -> None:
    """Train by `config["folder"]`'s recipe. Raises TrainingStopped where the run ends before its last evaluation."""
    hush()
    folder = Path(config["folder"])
    recipe = load(folder / "recipe.toml")
    last = checkpoint.latest(folder)
    done = checkpoint.step_of(last) if last else 0
    # What the scheduler heard before an interruption it hears again; later evaluations are made again.
    for line in read(folder):
        if line["step"] <= done < recipe.run.num_steps:
            tune.report(line)
    evaluations = read(folder)
    if not evaluations or evaluations[-1]["step"] < recipe.run.num_steps:
        trial = {
            "probe": config["probe"],
            "resources": config["resources"],
            "callbacks": [TuneReportCallback()],
        }
        fit(recipe, folder, config["rows"], config["num_rows"], trial)
        evaluations = read(folder)
    if not evaluations or evaluations[-1]["step"] < recipe.run.num_steps:
        raise TrainingStopped("a guard ended the trial before its last evaluation")
    tune.report(evaluations[-1])
