"""Claim C9's grid: where in the chain an encoder is trained, over how many steps, and in how many it is then used.

Of one training seed and few images, for there are many cells: it shows a pattern; the claim's parts decide.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from craftor.claims.effects import NotMeasured, contrast, crossed, values
from craftor.claims.making import last_of, read_images, score_together
from craftor.claims.methods import Budget
from craftor.evaluate import Tuned, used_steps
from craftor.figures import LIGHT, style
from craftor.recipe import Recipe, Tuning
from craftor.verdict import number

SEED = 0
USED = (None, 0.5, 0.75, 1.0)
"""The last steps in which an encoder is used, as a share of all; None for those of its training."""
DIGITS = {"quality": 2, "preference": 2, "accuracy": 2, "clip": 3}


@dataclass(frozen=True)
class Cell:
    method: str
    used: float | None

    @property
    def name(self) -> str:
        """Of its images."""
        return f"{self.method}-in-{'its-own' if self.used is None else f'{self.used:g}'}"

    def steps(self, recipe: Recipe) -> tuple[int, int]:
        """The denoising steps that see the encoder."""
        assert isinstance(recipe.task, Tuning)
        num_steps = recipe.task.rollout.num_steps
        return used_steps(recipe) if self.used is None else (num_steps - round(self.used * num_steps), num_steps)


def cells(methods: Sequence[str]) -> list[Cell]:
    return [Cell(method, used) for method, used in product(methods, USED)]


def score(methods: Sequence[str], budget: Budget, out: Path) -> None:
    """The images of every cell, of runs that are there."""
    mixtures = {}
    for cell in cells(methods):
        recipe, last = last_of(out, cell.method, SEED)
        mixtures[cell.name] = [Tuned(last, 1.0, cell.steps(recipe))]
    score_together(mixtures, SEED, budget, out, few=True)


def measure(methods: Sequence[str], out: Path) -> list[dict[str, Any]]:
    """Of each cell its window, the steps it is used in, and by metric the gain over the base with its interval."""
    rows = []
    for cell in cells(methods):
        recipe, _ = last_of(out, cell.method, SEED)
        found = read_images(cell.name, SEED, out)
        row: dict[str, Any] = {"window": list(used_steps(recipe)), "used": list(cell.steps(recipe))}
        for metric in DIGITS:
            try:
                gain = contrast([(1, values(found, cell.name, metric)), (-1, values(found, "base", metric))])
            except NotMeasured:
                continue
            effect = crossed(gain[None])
            row[metric] = {"effect": effect.effect, "ci95": list(effect.ci95)}
        rows.append(row)
    return rows


def draw(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """A table of gains for each metric, a row a window and a column for what it is used in; shade by gain.

    Gains whose interval is clear of 0 are bold.
    """
    metrics = [metric for metric in DIGITS if metric in rows[0]]
    windows = [_span(row["window"]) for row in rows[:: len(USED)]]
    used = ["its own", *(_span(row["used"]) for row in rows[1 : len(USED)])]
    with matplotlib.rc_context(style(LIGHT)):
        figure = Figure(figsize=(3.4 * len(metrics), 3.6), dpi=150, layout="constrained", facecolor="white")
        for panel, metric in enumerate(metrics, start=1):
            axes = figure.add_subplot(1, len(metrics), panel)
            gains = np.array([row[metric]["effect"] for row in rows]).reshape(-1, len(USED))
            most = max(abs(gains).max(), 1e-9)
            axes.imshow(gains, cmap="RdBu", vmin=-1.6 * most, vmax=1.6 * most, aspect="auto")
            for index, row in enumerate(rows):
                low, high = row[metric]["ci95"]
                axes.text(
                    index % len(USED),
                    index // len(USED),
                    number(row[metric]["effect"], DIGITS[metric], sign=True),
                    ha="center",
                    va="center",
                    fontsize=8,
                    fontweight="bold" if low > 0 or high < 0 else "normal",
                )
            axes.set_title(f"{metric}, tuned \N{MINUS SIGN} base", loc="left", fontsize=9, color=LIGHT.muted)
            axes.set_xticks(range(len(USED)), used, fontsize=8)
            axes.set_yticks(range(len(windows)), windows, fontsize=8)
            axes.set_xlabel("used in steps")
            axes.tick_params(length=0)
            axes.grid(visible=False)
            if panel == 1:
                axes.set_ylabel("trained in steps")
        figure.savefig(path, metadata={"Software": None})
    return path


def _span(steps: Sequence[int]) -> str:
    """Counted from 1."""
    return f"{steps[0] + 1}\N{EN DASH}{steps[1]}"
