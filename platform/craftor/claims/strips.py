"""Images from the base to a tuned encoder, with what the scorers say of them by weight: the picture of claim C7."""

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from craftor.evaluation_files import Evaluated
from craftor.evaluation_summary import interpolation, strip_of
from craftor.figures import LIGHT, limits, style

NUM_ROWS = 4


def draw(path: Path, evaluations: Sequence[Evaluated], variant: str, metrics: Sequence[str]) -> Path:
    """Strips of the first evaluation on the left; on the right each metric by weight, a line for each evaluation.

    evaluations: images that were made with the weights between base and `variant`, one for each training seed.
    """
    found = [interpolation(evaluated.images, variant) for evaluated in evaluations]
    weights = [point["weight"] for point in found[0]]
    there = [name for name in metrics if name in found[0][0]]
    with matplotlib.rc_context(style(LIGHT)):
        figure = Figure(figsize=(9, 4.2), dpi=150, layout="constrained", facecolor="white")
        grid = figure.add_gridspec(len(there), 2, width_ratios=(1.25, 1))
        picture = figure.add_subplot(grid[:, 0])
        picture.imshow(_sheet(evaluations[0], variant), interpolation="nearest")
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


def _sheet(evaluated: Evaluated, variant: str) -> np.ndarray:
    """Rows of pictures by weight, of the first prompts."""
    kept = {(i["number"], i["variant"]): i["png"] for i in evaluated.images if i["seed"] == 0 and i["png"]}
    rows = []
    for number in range(NUM_ROWS):
        pictures = []
        for name in strip_of(variant):
            with Image.open(io.BytesIO(kept[number, name])) as image:
                pictures.append(np.asarray(image.convert("RGB")))
        rows.append(np.concatenate(pictures, axis=1))
    return np.concatenate(rows, axis=0)
