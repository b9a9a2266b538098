"""`make bench-search`: what a search of reward weights and windows costs and finds, and what mixing finds instead.

`recipes/micro_search.toml` as it is: 16 trials on this machine. Then, on the held-out prompts with noise that it
never drew, its winner against trial 0 (the recipe's own weights), and against the best mixture of three encoders that
were tuned on one reward each. Last, some trials again without the shared prefix cache.
"""

import argparse
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from benchmarks import harness
from craftor import checkpoint, job, trainable
from craftor.diffuser import load as load_diffuser
from craftor.locate import shipped_recipe
from craftor.mixture import Member
from craftor.recipe import Recipe, RewardTuning, load
from craftor.searching.judge import Judge, Scores
from craftor.searching.mix import MIXTURE, search_mix
from craftor.searching.search import Found, search
from craftor.searching.tuning import trial_folder
from craftor.statistics import paired

RECIPE = "micro_search.toml"
FRESH = 1_000_003
"""Added to the recipe's seed: noise that no trial was judged by."""
FAINT = 0.1
"""Weight of the other rewards where an encoder is tuned on one; the CLIP term may not be missing."""
UNCACHED = 4
QUICK: dict[str, Any] = {
    **{"run.num_steps": 3, "run.batch_size": 4, "search.num_trials": 3, "search.num_prompts": 4},
    **{"search.asha": {"every": 1, "num_prompts": 2}, "search.mix.num_trials": 6, "evaluation.num_prompts": 6},
    "search.constraints": [{"metric": "diversity", "at_least": 0.1, "relative_to_base": True}],
    "search.mix.num_prompts": 4,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few steps and prompts: to see that it runs")
    arguments = parser.parse_args()
    started = time.perf_counter()
    torch.set_num_threads(1)
    console = Console(width=120)
    source, overrides = shipped_recipe(RECIPE), QUICK if arguments.quick else {}
    recipe = load(source, overrides)
    out = harness.OUT / "search"
    shutil.rmtree(out, ignore_errors=True)

    found, search_seconds = timed(lambda: search(recipe, source, out / "search"))
    specialists, train_seconds = timed(lambda: [specialist(source, overrides, name, out) for name in rewards(recipe)])
    sources = [str(run) for run in specialists]
    _, mix_seconds = timed(lambda: search_mix(recipe, source, sources, out / "mix"))
    uncached = {**overrides, "search.share_prefix": False, "search.num_trials": min(UNCACHED, len(found.trials))}
    without = load(source, uncached)
    # All to their end, winner or not: the first is also the recipe's own weights, fully trained.
    to_the_end = without.search.model_copy(update={"asha": None, "constraints": ()})
    without = without.model_copy(update={"search": to_the_end})
    plain = search(without, source, out / "without-cache")

    scores = held_out(recipe, found, plain, out / "mix")
    metric = recipe.search.objectives[0].metric
    gains = {name: paired(scores["base"][metric], scores[name][metric]) for name in scores if name != "base"}
    winner = paired(scores["default"][metric], scores["winner"][metric])
    ratio, seconds = prefix_ratio(found, plain)
    figures = {
        "minutes_16_trials": search_seconds / 60,
        "winner_gain": winner["delta"],
        "winner_gain_ci_low": winner["ci95"][0],
        "mix_gain_share": gains["mixture"]["delta"] / gains["winner"]["delta"],
        "mix_compute_share": (train_seconds + mix_seconds) / search_seconds,
        "prefix_cache_time_ratio": ratio,
    }
    details = {
        "settings": vars(arguments) | {"objective": metric, "trials": len(found.trials)},
        "winner_over_default": winner,
        "over_base": gains,
        "held_out_means": {name: Judge.means(found_scores) for name, found_scores in scores.items()},
        "winner": {"trial": found.front[0].number, "values": found.front[0].values},
        "states": {trial.number: trial.state for trial in found.trials},
        "mixture": json.loads((out / "mix" / MIXTURE).read_text())["mixtures"][0],
        "minutes": {"specialists": train_seconds / 60, "mixtures": mix_seconds / 60},
        "mix_compute_share": "three trainings and the search of mixtures; the latter alone: "
        f"{mix_seconds / search_seconds:.3f}",
        "prefix_cache": seconds,
    }
    for key, value in figures.items():
        console.print(f"{key:32s} {value:.4g}", highlight=False)
    console.print(harness.write("search", figures=figures, details=details, started=started))


def timed(call: Any) -> tuple[Any, float]:
    started = time.perf_counter()
    return call(), time.perf_counter() - started


def rewards(recipe: Recipe) -> list[str]:
    assert isinstance(recipe.task, RewardTuning)
    return [name for name, reward in recipe.task.rewards.items() if not reward.evaluation_only]


def specialist(source: Path, overrides: Mapping[str, Any], name: str, out: Path) -> Path:
    """Train on one reward, with all cores on it and the search's prefix cache; returns the run's folder."""
    recipe = load(source, dict(overrides))
    assert isinstance(recipe.task, RewardTuning)
    start = recipe.task.window.span(recipe.task.rollout.num_steps).start
    alone = {f"task.rewards.{other}.weight": FAINT for other in rewards(recipe) if other != name}
    run = out / name
    changed = {
        **overrides,
        **alone,
        "workers": {"num": 2},
        "name": name,
        "task.prefix": {"mode": "cache", "cache": str(out / "search" / "prefix" / f"to-{start}")},
    }
    job.train(load(source, changed), source, run)
    return run


def held_out(recipe: Recipe, found: Found, plain: Found, mix: Path) -> dict[str, Scores]:
    """Base, trial 0, the winner and the best mixture on the evaluation's prompts, all from the same fresh noise."""
    assert recipe.evaluation is not None and recipe.search is not None and isinstance(recipe.task, RewardTuning)
    judged_by = {"prompts": recipe.evaluation.prompts, "num_prompts": recipe.evaluation.num_prompts}
    fresh = recipe.model_copy(
        update={"seed": recipe.seed + FRESH, "search": recipe.search.model_copy(update=judged_by)}
    )
    diffuser = load_diffuser(recipe.model)
    judge = Judge(fresh, diffuser)
    judge.walk_base(min(recipe.search.mix.earliest, recipe.task.rollout.num_steps - 8))

    def member(folder: str | Path, weight: float, steps: Sequence[int]) -> Member:
        encoders = {**diffuser.encoders, **trainable.load(diffuser, Path(folder))}
        return Member(judge.embed(encoders), weight, range(*steps))

    def trial(run: Found, number: int) -> list[Member]:
        folder = trial_folder(run.folder, number)
        last, acts = checkpoint.latest(folder), load(folder / "recipe.toml").task.acts()
        return [member(last, 1.0, (acts.start, acts.stop))]

    best = json.loads((mix / MIXTURE).read_text())["mixtures"][0]["encoders"]
    variants = {
        "base": [],
        "default": trial(plain, 0),
        "winner": trial(found, found.front[0].number),
        "mixture": [member(encoder["folder"], encoder["weight"], encoder["steps"]) for encoder in best],
    }
    return {name: judge.scores(members) for name, members in variants.items()}


def prefix_ratio(cached: Found, plain: Found) -> tuple[float, dict[str, Any]]:
    """Training time of the same trials with the shared cache, its filling among them, over the time without."""
    numbers = [trial.number for trial in plain.trials if trial.state == "finished"]
    num_steps = load(cached.folder / "recipe.toml").run.num_steps
    with_cache = [num_steps * step_seconds(cached.folder, number) for number in numbers]
    without = [num_steps * step_seconds(plain.folder, number) for number in numbers]
    filling = json.loads((cached.folder / "search.json").read_text())["prefix_seconds"]
    share = filling * len(numbers) / len(cached.trials)
    values = {trial.number: trial.values for trial in cached.trials}
    assert all(values[trial.number] == trial.values for trial in plain.trials), "they are not the same trials"
    seconds = {"with": with_cache, "without": without, "filling": filling}
    return (sum(with_cache) + share) / sum(without), seconds


def step_seconds(folder: Path, number: int) -> float:
    """The median over a trial's steps."""
    run = trial_folder(folder, number)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    batch = load(run / "recipe.toml").run.batch_size
    return float(np.median([batch / line["images_per_second"] for line in lines[1:]]))


if __name__ == "__main__":
    main()
