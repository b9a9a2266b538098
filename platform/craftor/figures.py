"""Numbers and pictures of a run -> PNGs: a training curve in two themes, and the poster.

Figures are built without pyplot, so drawing keeps no global state and needs no display.
"""

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

POSTER_SIZE = (1400, 1000)
NUM_PAIRS = 6
_MARGIN, _SIDE = 60, 192  # 192 is three screen pixels for each pixel of a 64-pixel image


@dataclass(frozen=True)
class Theme:
    ink: str
    muted: str
    line: str
    accent: str


LIGHT = Theme(ink="#1f2328", muted="#6b737c", line="#d9dde1", accent="#2563c9")
DARK = Theme(ink="#e4e7ea", muted="#98a1aa", line="#3a4149", accent="#7fb0ff")


@dataclass(frozen=True)
class Effect:
    """One metric's change in standard deviations of its base scores."""

    name: str
    low: float
    middle: float
    high: float
    kind: str


@dataclass(frozen=True)
class Pair:
    prompt: str
    base: Image.Image
    tuned: Image.Image


def curve(steps: np.ndarray, values: np.ndarray, theme: Theme) -> bytes:
    """One training curve as a transparent PNG; the title belongs to the page, where it stays text."""
    with matplotlib.rc_context(style(theme)):
        figure = Figure(figsize=(3.4, 1.7), dpi=200, layout="constrained")
        _draw_curve(figure.add_subplot(), steps, values, theme)
        buffer = io.BytesIO()
        figure.savefig(buffer, transparent=True, metadata={"Software": None})
    return buffer.getvalue()


def poster(
    path: Path,
    *,
    title: str,
    verdict: str,
    pairs: Sequence[Pair],
    effects: Sequence[Effect],
    curve: tuple[str, np.ndarray, np.ndarray] | None,
    interpolation: Sequence[tuple[str, np.ndarray, np.ndarray]],
) -> None:
    """The best of a run in one picture: pairs above, then effects, the curve and the interpolation that there are."""
    theme = LIGHT
    with matplotlib.rc_context(style(theme)):
        figure = Figure(figsize=(POSTER_SIZE[0] / 100, POSTER_SIZE[1] / 100), dpi=100, facecolor="white")
        _text(figure, _MARGIN, 44, title, size=21, color=theme.ink, weight="bold")
        _text(figure, _MARGIN, 86, textwrap.fill(verdict, 150), size=11, color=theme.muted, linespacing=1.5)
        for column, pair in enumerate(pairs[:NUM_PAIRS]):
            _draw_pair(figure, column, pair, theme)
        if pairs:
            for row, label in enumerate(("base", "tuned")):
                y = 152 + row * (_SIDE + 8) + _SIDE / 2
                _text(figure, _MARGIN - 16, y, label, size=10, color=theme.muted, rotation=90, ha="right", va="center")
        panels = [lambda box: _draw_effects(figure, box, effects, theme)] if effects else []
        if curve is not None:
            panels.append(lambda box: _draw_training(figure, box, curve, theme))
        if interpolation:
            panels.append(lambda box: _draw_interpolation(figure, box, interpolation, theme))
        gap = 90
        width = (POSTER_SIZE[0] - 2 * _MARGIN - gap * (len(panels) - 1)) / max(1, len(panels))
        for index, draw in enumerate(panels):
            draw((_MARGIN + index * (width + gap), 682, width, 250))
        figure.savefig(path, metadata={"Software": None})


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average over a twentieth of the run, narrower at both ends."""
    ones = np.ones(min(len(values), max(1, len(values) // 20) | 1))
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")


def limits(values: np.ndarray) -> tuple[float, float]:
    """Ends of an axis at least a tenth of the values tall, so that a thousandth does not look like a fall."""
    middle, half = (values.max() + values.min()) / 2, max(np.ptp(values), 0.1 * np.abs(values).max(), 1e-9) / 2
    return float(middle - half), float(middle + half)


def style(theme: Theme) -> dict:
    return {
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "text.color": theme.ink,
        "axes.edgecolor": theme.line,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": theme.line,
        "ytick.color": theme.line,
        "xtick.labelcolor": theme.muted,
        "ytick.labelcolor": theme.muted,
        "axes.formatter.useoffset": False,
    }


def _draw_curve(axes: Axes, steps: np.ndarray, values: np.ndarray, theme: Theme) -> None:
    axes.plot(steps, values, color=theme.accent, linewidth=0.8, alpha=0.28)
    axes.plot(steps, smooth(values), color=theme.accent, linewidth=1.8)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.margins(x=0.01)


def _draw_pair(figure: Figure, column: int, pair: Pair, theme: Theme) -> None:
    gap = (POSTER_SIZE[0] - 2 * _MARGIN - NUM_PAIRS * _SIDE) / (NUM_PAIRS - 1)
    x = round(_MARGIN + column * (_SIDE + gap))
    for row, image in enumerate((pair.base, pair.tuned)):
        nearest = image.width <= _SIDE
        scaled = image.convert("RGB").resize(
            (_SIDE, _SIDE), Image.Resampling.NEAREST if nearest else Image.Resampling.LANCZOS
        )
        top = 152 + row * (_SIDE + 8)
        # figimage copies pixels as they are: no resampling blurs the comparison.
        figure.figimage(np.asarray(scaled), x, POSTER_SIZE[1] - top - _SIDE)
    lines = textwrap.wrap(pair.prompt, 28, max_lines=3, placeholder=" …")
    _text(figure, x, 152 + 2 * _SIDE + 20, "\n".join(lines), size=9, color=theme.ink, linespacing=1.4)


def _draw_effects(figure: Figure, box: tuple[float, ...], effects: Sequence[Effect], theme: Theme) -> None:
    _text(figure, box[0], box[1] - 30, "Change, in standard deviations of the base", size=11, weight="bold")
    axes = _axes(figure, (box[0] + 110, box[1], box[2] - 110, box[3]))
    rows = np.arange(len(effects))[::-1]
    for y, effect in zip(rows, effects, strict=True):
        color = theme.muted if effect.kind == "trained" else theme.accent
        axes.plot([effect.low, effect.high], [y, y], color=color, linewidth=2, solid_capstyle="butt")
        axes.plot(effect.middle, y, "o", color=color, markersize=6)
    axes.axvline(0, color=theme.line, linewidth=1, zorder=0)
    axes.set_yticks(rows, [effect.name for effect in effects])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(-0.7, len(effects) - 0.3)
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    _text(figure, box[0] + 110, box[1] + box[3] + 30, "blue: never trained on", size=9, color=theme.accent)
    _text(figure, box[0] + 280, box[1] + box[3] + 30, "gray: trained on", size=9, color=theme.muted)


def _draw_training(
    figure: Figure, box: tuple[float, ...], curve: tuple[str, np.ndarray, np.ndarray], theme: Theme
) -> None:
    name, steps, values = curve
    _text(figure, box[0], box[1] - 30, f"Training: {name} reward by step", size=11, weight="bold")
    _draw_curve(_axes(figure, (box[0] + 20, box[1], box[2] - 20, box[3])), steps, values, theme)


def _draw_interpolation(
    figure: Figure, box: tuple[float, ...], rows: Sequence[tuple[str, np.ndarray, np.ndarray]], theme: Theme
) -> None:
    _text(figure, box[0], box[1] - 30, "From base (0) to tuned (1)", size=11, weight="bold")
    gap, top = 40, 16  # room for the names above each small chart
    height = (box[3] - top - gap * (len(rows) - 1)) / len(rows)
    for index, (name, weights, values) in enumerate(rows):
        axes = _axes(figure, (box[0] + 20, box[1] + top + index * (height + gap), box[2] - 20, height))
        axes.plot(weights, values, "o-", color=theme.accent, linewidth=1.6, markersize=4.5)
        axes.set_title(name, loc="left", fontsize=9, color=theme.muted, pad=6)
        axes.set_xticks(weights, [f"{w:g}" for w in weights] if index == len(rows) - 1 else [""] * len(weights))
        axes.yaxis.set_major_locator(MaxNLocator(2))
        low, high = limits(values)
        axes.set_ylim(low - 0.25 * (high - low), high + 0.25 * (high - low))


def _axes(figure: Figure, box: tuple[float, ...]) -> Axes:
    """Axes from pixels counted from the top left."""
    x, y, width, height = box
    total_width, total_height = POSTER_SIZE
    return figure.add_axes(
        (x / total_width, 1 - (y + height) / total_height, width / total_width, height / total_height)
    )


def _text(figure: Figure, x: float, y: float, text: str, **style: Any) -> None:
    style = {"va": "top", **style}
    # A prompt may hold dollar signs, which are no mathematics.
    figure.text(x / POSTER_SIZE[0], 1 - y / POSTER_SIZE[1], text.replace("$", r"\$"), **style)
