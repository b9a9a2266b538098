"""Trials -> PNGs: where they lie between two measures, which keys mattered, and all values of all trials at once."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from craftor.figures import Theme, style


@dataclass(frozen=True)
class Point:
    """A trial between two measures."""

    number: int
    x: float
    y: float
    kind: str
    """`eligible`, `breaks` a constraint, or was `stopped`."""
    on_front: bool


@dataclass(frozen=True)
class Column:
    """One axis of the parallel coordinates: a value for each trial, and where it stands in [0, 1]."""

    name: str
    heights: np.ndarray
    ticks: Sequence[tuple[float, str]]


def pareto(points: Sequence[Point], base: tuple[float, float] | None, labels: tuple[str, str], theme: Theme) -> bytes:
    """Measures against each other; the front is joined, `base` is a cross."""
    with matplotlib.rc_context(style(theme)):
        figure, axes = _figure(6.4, 4.0)
        for kind, label, face, edge in (
            ("stopped", "stopped early", theme.line, theme.line),
            ("breaks", "breaks a constraint", "none", theme.muted),
            ("eligible", "finished", theme.accent, theme.accent),
        ):
            chosen = [point for point in points if point.kind == kind]
            if chosen:
                x, y = [point.x for point in chosen], [point.y for point in chosen]
                axes.scatter(x, y, s=28, facecolors=face, edgecolors=edge, label=label, zorder=3)
        front = sorted((p for p in points if p.on_front), key=lambda p: p.x)
        axes.plot([p.x for p in front], [p.y for p in front], color=theme.accent, linewidth=1, zorder=2)
        for point in front:
            axes.annotate(str(point.number), (point.x, point.y), (5, 5), textcoords="offset points", color=theme.ink)
        if base is not None:
            axes.plot(*base, "x", color=theme.ink, label="base", zorder=3)
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.legend(frameon=False, fontsize=8)
        return _png(figure)


def importance(by_metric: Mapping[str, Mapping[str, float]], theme: Theme) -> bytes:
    """For each objective, the share of its variation that each key explains."""
    keys = list(dict.fromkeys(key for shares in by_metric.values() for key in shares))
    with matplotlib.rc_context(style(theme)):
        figure, axes = _figure(6.4, 0.8 + 0.35 * len(keys) * max(1, len(by_metric)))
        height = 0.8 / max(1, len(by_metric))
        places = np.arange(len(keys))[::-1]
        for index, (metric, shares) in enumerate(by_metric.items()):
            color = (theme.accent, theme.muted, theme.ink)[index % 3]
            at = places + 0.4 - height * (index + 0.5)
            axes.barh(at, [shares.get(key, 0.0) for key in keys], height * 0.85, color=color, label=metric)
        axes.set_yticks(places, keys)
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(0, 1)
        if len(by_metric) > 1:
            axes.legend(frameon=False, fontsize=8)
        return _png(figure)


def parallel(columns: Sequence[Column], scores: np.ndarray, winners: Sequence[int], theme: Theme) -> bytes:
    """Every trial as a line through its values; `scores` (nan where there are none) colour them, more is stronger."""
    with matplotlib.rc_context(style(theme)):
        figure, axes = _figure(max(6.4, 1.5 * len(columns)), 3.6)
        ranks = _unit(scores)
        colors = LinearSegmentedColormap.from_list("scores", [theme.line, theme.accent])
        for index in np.argsort(np.nan_to_num(ranks, nan=-1.0)):
            best = index in winners
            color = theme.ink if best else theme.line if np.isnan(ranks[index]) else colors(ranks[index])
            heights = [column.heights[index] for column in columns]
            axes.plot(range(len(columns)), heights, color=color, linewidth=2.2 if best else 1.1, alpha=0.9)
        for place, column in enumerate(columns):
            axes.axvline(place, color=theme.line, linewidth=1, zorder=0)
            for height, label in column.ticks:
                axes.annotate(label, (place, height), (4, 0), textcoords="offset points", fontsize=7, color=theme.muted)
        axes.set_xticks(range(len(columns)), [column.name for column in columns], rotation=12)
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
        axes.set_xlim(-0.4, len(columns) - 0.5)
        return _png(figure)


def _unit(values: np.ndarray) -> np.ndarray:
    low, high = np.nanmin(values), np.nanmax(values)
    return (values - low) / (high - low) if high > low else np.where(np.isnan(values), np.nan, 1.0)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), dpi=160, layout="constrained")
    return figure, figure.add_subplot()


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, transparent=True, metadata={"Software": None})
    return buffer.getvalue()
