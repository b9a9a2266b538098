"""How fast methods gain: one reward, trained or only measured, against samples and against seconds of training."""

import json
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from craftor.figures import LIGHT, smooth, style
from craftor.recipe import load_run
from craftor.run_files import METRICS

Curve = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Samples, seconds and the smoothed reward, by step; the mean over seeds."""
LINES = list(product(("-", "--", ":"), (LIGHT.accent, LIGHT.ink, LIGHT.muted)))


def curve(runs: Sequence[Path], metric: str) -> Curve:
    """Of one method's runs, which are equally long. Raises KeyError where they do not log the metric."""
    seconds, rewards = [], []
    recipe = load_run(runs[0])
    batch, each = recipe.run.batch_size, getattr(recipe.task, "samples_per_prompt", 1)
    for run in runs:
        lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
        seconds.append(np.cumsum([batch / line["images_per_second"] for line in lines]))
        rewards.append(smooth(np.array([line[metric] for line in lines])))
    return batch * each * np.arange(1, len(rewards[0]) + 1), np.mean(seconds, axis=0), np.mean(rewards, axis=0)


def time_to_reward(curves: Mapping[str, Curve]) -> dict[str, dict[str, float]]:
    """By method, samples and seconds to the level that all reach: the best of the one whose best is lowest."""
    level = min(float(rewards.max()) for _, _, rewards in curves.values())
    found = {}
    for name, (samples, seconds, rewards) in curves.items():
        reached = int(np.argmax(rewards >= level))
        found[name] = {"level": level, "samples": float(samples[reached]), "seconds": float(seconds[reached])}
    return found


def draw(path: Path, metric: str, curves: Mapping[str, Curve]) -> Path:
    """The reward against samples, and against seconds."""
    with matplotlib.rc_context(style(LIGHT)):
        figure = Figure(figsize=(9, 3.4), dpi=150, layout="constrained", facecolor="white")
        for panel, (axis, position) in enumerate((("samples", 0), ("seconds of training", 1)), start=1):
            axes = figure.add_subplot(1, 2, panel)
            for (name, found), (line, shade) in zip(curves.items(), LINES, strict=False):
                axes.plot(found[position], found[2], label=name, color=shade, linestyle=line, linewidth=1.8)
            axes.set_xlabel(axis)
            axes.set_ylabel(f"{metric}, training prompts")
            axes.legend(frameon=False)
        figure.savefig(path, metadata={"Software": None})
    return path
