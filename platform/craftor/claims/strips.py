"""Images from the base to a tuned encoder, with what the scorers say of them by weight: the picture of claim C7."""

import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from craftor.figures import LIGHT, limits, style

NUM_ROWS = 4


def draw(path: Path, evaluations: Sequence[Path], metrics: Sequence[str]) -> Path:
    """Strips of the first evaluation on the left; on the right each metric by weight, a line for each evaluation.

    evaluations: folders of images that were made with the weights between, one for each training seed.
    """
    first = evaluations[0]
    strips = [sample["strip"] for sample in json.loads((first / "samples.json").read_text()) if sample["strip"]]
    found = [json.loads((folder / "summary.json").read_text())["interpolation"] for folder in evaluations]
    weights = [point["weight"] for point in found[0]]
    there = [name for name in metrics if name in found[0][0]]
    with matplotlib.rc_context(style(LIGHT)):
        figure = Figure(figsize=(9, 4.2), dpi=150, layout="constrained", facecolor="white")
        grid = figure.add_gridspec(len(there), 2, width_ratios=(1.25, 1))
        picture = figure.add_subplot(grid[:, 0])
        picture.imshow(_sheet(first, strips[:NUM_ROWS]), interpolation="nearest")
        picture.set_yticks([])
        side = picture.get_xlim()[1] / len(weights)
        picture.set_xticks([(column + 0.5) * side for column in range(len(weights))], [f"{w:g}" for w in weights])
        picture.set_xlabel("weight of the tuned encoder")
        for row, name in enumerate(there):
            axes = figure.add_subplot(grid[row, 1])
            values = np.array([[point[name] for point in points] for points in found])
            for line in values:
                axes.plot(weights, line, "o-", color=LIGHT.accent, linewidth=1.2, markersize=3, alpha=0.7)
            axes.set_title(name, loc="left", fontsize=9, color=LIGHT.muted)
            axes.set_xticks(weights)
            low, high = limits(values)
            axes.set_ylim(low - 0.15 * (high - low), high + 0.15 * (high - low))
            axes.yaxis.set_major_locator(MaxNLocator(2))
        figure.savefig(path, metadata={"Software": None})
    return path


def _sheet(folder: Path, strips: Sequence[Sequence[str]]) -> np.ndarray:
    rows = []
    for strip in strips:
        with_pixels = []
        for name in strip:
            with Image.open(folder / name) as image:
                with_pixels.append(np.asarray(image.convert("RGB")))
        rows.append(np.concatenate(with_pixels, axis=1))
    return np.concatenate(rows, axis=0)
