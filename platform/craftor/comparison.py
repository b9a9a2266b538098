"""Several evaluated runs of one base -> how they compare, metric by metric, with the base and with each other.

All were made from the same prompts and noise, so every difference is paired. A metric is compared where the base's own
images got the same scores in every run: then it was the same scorer.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from craftor import checkpoint, evaluation_files, watch
from craftor.evaluation_files import ABOUT, Evaluated, EvaluationError
from craftor.evaluation_summary import diversity, grid
from craftor.recipe import load_run
from craftor.statistics import decimals, holm, mean, paired, sign_flip

BASE = "base"
_SAME = ("base_sha256", "prompts", "seed", "num_seeds", "rollout")


@dataclass(frozen=True)
class Comparison:
    """`runs` by name, in the order given; `metrics` as `compare.json` has them."""

    runs: dict[str, Evaluated]
    metrics: list[dict[str, Any]]
    left_out: list[str]
    """Metrics that some run lacks, or scored otherwise."""

    @property
    def about(self) -> dict[str, Any]:
        return next(iter(self.runs.values())).about

    @property
    def variants(self) -> list[str]:
        """The base, then the runs."""
        return [BASE, *self.runs]

    def picture(self, variant: str, number: int, seed: int) -> bytes | None:
        """A kept picture's PNG."""
        run, kind = (next(iter(self.runs)), "base") if variant == BASE else (variant, "tuned")
        for image in self.runs[run].images:
            if (image["number"], image["seed"], image["variant"]) == (number, seed, kind):
                return image["png"]
        return None


def compare(folders: Sequence[Path]) -> Comparison:
    """Read the evaluations of runs' folders, or evaluations' own, and compare them.

    Raises EvaluationError for one that is not finished, and for evaluations of another base, other prompts or other
    noise.
    """
    runs: dict[str, Evaluated] = {}
    for folder in folders:
        name, evaluated = _find(folder)
        names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        runs[next(free for free in names if free not in (BASE, *runs))] = evaluated
    (first, one), *others = runs.items()
    for name, other in others:
        there, here = ({key: found.about[key] for key in _SAME} for found in (one, other))
        evaluation_files.refuse_difference(there, here, f"{name} cannot be compared with {first}:", "")
    metrics, left_out = [], []
    for metric in dict.fromkeys(key for run in runs.values() for key in (*run.metrics, "diversity")):
        values = {name: _values(run, metric) for name, run in runs.items()}
        bases = [pair[0] for pair in values.values() if pair is not None]
        same = len(bases) == len(runs) and all(np.array_equal(bases[0], b, equal_nan=True) for b in bases)
        if not same:
            left_out.append(metric)
        elif not np.isnan(bases[0]).all():
            tuned = {name: pair[1] for name, pair in values.items() if pair is not None}
            metrics.append(_compared(metric, {BASE: bases[0], **tuned}, runs))
    if not metrics:
        raise EvaluationError(f"{', '.join(runs)}: no metric in common, or other images of the base: {left_out}")
    every = [pair for row in metrics for pair in row["pairs"]]
    for pair, corrected in zip(every, holm([pair["p"] for pair in every]), strict=True):
        pair["p_holm"] = corrected
    return Comparison(runs, metrics, left_out)


def markdown(comparison: Comparison) -> str:
    """A table: a row for each metric, a column for the base and each run: mean, change, wins; * if Holm's p < 0.05."""
    lines = [
        f"| metric | {' | '.join(comparison.variants)} |",
        f"|---|{'---|' * len(comparison.variants)}",
    ]
    for row in comparison.metrics:
        over_base = {pair["of"]: pair for pair in row["pairs"] if pair["over"] == BASE}
        digits = max(decimals(pair["ci95"]) for pair in over_base.values())
        cells = [f"{row['means'][BASE]['mean']:.{digits}f}"]
        for name, pair in over_base.items():
            low, high = pair["ci95"]
            star = " *" if pair["p_holm"] < 0.05 else ""
            cells.append(
                f"{row['means'][name]['mean']:.{digits}f}, {pair['delta']:+.{digits}f} "
                f"[{low:+.{digits}f}, {high:+.{digits}f}], {pair['win_rate']:.0%}{star}"
            )
        lines.append(f"| {row['metric']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Everything but the images."""
    about = comparison.about
    return {
        "base_sha256": about["base_sha256"],
        "prompts": about["prompts"],
        "num_seeds": about["num_seeds"],
        "runs": {
            name: {"folder": str(run.folder), "tuned": run.about["variants"]["tuned"]}
            for name, run in comparison.runs.items()
        },
        "metrics": comparison.metrics,
        "left_out": comparison.left_out,
    }


def _compared(metric: str, values: Mapping[str, np.ndarray], runs: Mapping[str, Evaluated]) -> dict[str, Any]:
    pairs = [
        {
            "of": of,
            "over": over,
            **_without_means(paired(values[over], values[of])),
            "p": sign_flip(values[over], values[of]),
        }
        for over, of in itertools.combinations(values, 2)
    ]
    trained = any(metric in run.about["trained"] for run in runs.values())
    return {
        "metric": metric,
        "held_out": not trained,
        "means": {name: mean(found) for name, found in values.items()},
        "pairs": pairs,
    }


def _without_means(found: dict[str, Any]) -> dict[str, Any]:
    return {key: found[key] for key in ("delta", "ci95", "win_rate")}


def _values(run: Evaluated, metric: str) -> tuple[np.ndarray, np.ndarray] | None:
    """The base's and the tuned encoder's scores, (prompts, seeds)."""
    if metric == "diversity":
        return diversity(run.images, "base"), diversity(run.images, "tuned")
    if metric not in run.metrics:
        return None
    return grid(run.images, "base", metric), grid(run.images, "tuned", metric)


def _find(folder: Path) -> tuple[str, Evaluated]:
    """The evaluation in a run's folder, or of one that is an evaluation itself, under the run's name."""
    if (folder / ABOUT).is_file():
        evaluation, run = folder, folder.parent if folder.name.startswith("evaluation") else folder
    else:
        evaluation, run = folder / "evaluation", folder
    if (run / "recipe.toml").is_file():
        _refuse_unfinished(run)
    return run.resolve().name, evaluation_files.read(evaluation)


def _refuse_unfinished(run: Path) -> None:
    last, num_steps = checkpoint.latest(run), load_run(run).run.num_steps
    done = checkpoint.step_of(last) if last else 0
    if done < num_steps and watch.ended(run) is None:
        raise EvaluationError(
            f"{run}: unfinished, {done} of {num_steps} steps are done; go on by: craftor train --resume {run}"
        )
