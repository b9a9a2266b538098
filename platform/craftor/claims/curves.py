"""How fast methods gain: a score of held-out images, against samples and against seconds of training."""

import json
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from craftor.figures import LIGHT, style
from craftor.recipe import load_run
from craftor.run_files import METRICS

Curve = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Samples, seconds and the score after them; the first point is the base."""
LINES = list(product(("-", "--", ":"), (LIGHT.accent, LIGHT.ink, LIGHT.muted)))


def curve(runs: Sequence[Path], steps: Sequence[int], scores: Float[np.ndarray, "runs points"]) -> Curve:
    """Of one method's runs, the mean over training seeds.

    steps: of the checkpoints whose images were scored; `scores` begin with the base's, of step 0.
    A step's seconds are the median over a run, which a slow moment of the machine does not move.
    """
    recipe = load_run(runs[0])
    samples = recipe.run.batch_size * getattr(recipe.task, "samples_per_prompt", 1)
    seconds = []
    for run in runs:
        lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
        seconds.append(np.median([samples / line["images_per_second"] for line in lines]))
    done = np.array([0, *steps])
    return samples * done, np.mean(seconds) * done, scores.mean(axis=0)


def time_to_reward(curves: Mapping[str, Curve]) -> dict[str, dict[str, float] | None]:
    """By method, samples and seconds to the level that all reach that gain at all; None for those that gain nothing.

    It is the best of the one whose best is lowest. Between two points the score is taken to rise evenly.
    """
    gaining = {name: curve for name, curve in curves.items() if curve[2].max() > curve[2][0]}
    level = min((float(scores.max()) for _, _, scores in gaining.values()), default=0.0)
    found: dict[str, dict[str, float] | None] = dict.fromkeys(curves)
    for name, (samples, seconds, scores) in gaining.items():
        last = int(np.argmax(scores >= level))  # above the base's, so that there is one before
        at = last - 1 + (level - scores[last - 1]) / (scores[last] - scores[last - 1])
        points = np.arange(len(scores))
        found[name] = {
            "level": level,
            "samples": float(np.interp(at, points, samples)),
            "seconds": float(np.interp(at, points, seconds)),
        }
    return found


def draw(path: Path, metric: str, curves: Mapping[str, Curve]) -> Path:
    """The score against samples, and against seconds."""
    with matplotlib.rc_context(style(LIGHT)):
        figure = Figure(figsize=(9, 3.4), dpi=150, layout="constrained", facecolor="white")
        for panel, (axis, position) in enumerate((("samples", 0), ("seconds of training", 1)), start=1):
            axes = figure.add_subplot(1, 2, panel)
            for (name, found), (line, shade) in zip(curves.items(), LINES, strict=False):
                axes.plot(found[position], found[2], marker="o", label=name, color=shade, linestyle=line, markersize=4)
            axes.set_xlabel(axis)
            axes.set_ylabel(f"{metric}, held-out prompts")
            axes.legend(frameon=False)
        figure.savefig(path, metadata={"Software": None})
    return path
