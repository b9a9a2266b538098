"""A search's trials -> `report.html`, one self-contained page, and its three plots as PNG files."""

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial
from PIL import Image

from craftor.figures import DARK, LIGHT
from craftor.pages import render
from craftor.recipe import Recipe
from craftor.report import data_uri
from craftor.searching import figures
from craftor.searching.figures import Column, Point
from craftor.searching.outcome import front, points, reason
from craftor.searching.settings import Search
from craftor.searching.study import Study, Tried
from craftor.searching.table import short, shown

PLOTS = {"pareto": "Between two measures", "importance": "Which keys mattered", "parallel": "All values of all trials"}


def write_search_report(
    folder: Path,
    recipe: Recipe,
    trials: Sequence[Tried],
    base: Mapping[str, float],
    errors: Mapping[int, str],
    study: Study,
) -> list[Path]:
    """Returns the page and the plots that there are; a search whose trials all failed has no plot."""
    search = study.search
    winners = front(trials, search)
    drawn = {"light": _plots(trials, winners, base, study, LIGHT), "dark": _plots(trials, winners, base, study, DARK)}
    pages = [folder / "report.html"]
    for name, png in drawn["light"].items():
        pages.append(folder / f"{name}.png")
        with Image.open(io.BytesIO(png)) as image:  # transparent for the page; a file may be shown on anything
            Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).save(pages[-1])
    pages[0].write_text(
        render(
            "search.html.j2",
            name=recipe.name,
            reason=reason(search),
            winners=winners,
            headings=[*(short(key) for key in study.space), *search.metrics],
            rows=[_row(trial, study, winners, errors) for trial in trials],
            base=[f"{base[metric]:.4g}" for metric in search.metrics],
            num_keys=len(study.space),
            num_prompts=search.num_prompts,
            num_seeds=search.num_seeds,
            plots=[(PLOTS[name], data_uri(png), data_uri(drawn["dark"][name])) for name, png in drawn["light"].items()],
        ),
        encoding="utf-8",
    )
    return pages


def importances(study: Study) -> dict[str, dict[str, float]]:
    """By objective, the share of its variation over finished trials that each key explains (functional ANOVA).

    Empty where fewer than four trials finished, and without an objective in which they do not differ.
    """
    finished = [trial for trial in study.trials() if trial.state == "finished"]
    found = {}
    for index, objective in enumerate(study.search.objectives):
        values = {trial.scores[objective.metric] for trial in finished}
        if len(finished) < 4 or len(values) < 2:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            shares = optuna.importance.get_param_importances(
                study.optuna,
                evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0),
                target=_value(index),
            )
        found[objective.metric] = {short(key): share for key, share in shares.items()}
    return found


def _value(index: int) -> Callable[[FrozenTrial], float]:
    return lambda trial: trial.values[index]


def _plots(
    trials: Sequence[Tried], winners: Sequence[Tried], base: Mapping[str, float], study: Study, theme: Any
) -> dict[str, bytes]:
    measured = [trial for trial in trials if trial.scores]
    if not measured:
        return {}
    search = study.search
    second = next((m for m in search.metrics if m != search.objectives[0].metric), None)
    first = search.objectives[0].metric
    placed = [
        Point(
            trial.number,
            trial.scores[second] if second else trial.number,
            trial.scores[first],
            "stopped" if trial.state == "stopped" else "eligible" if trial.eligible else "breaks",
            trial in winners,
        )
        for trial in measured
    ]
    plots = {
        "pareto": figures.pareto(
            placed, (base[second], base[first]) if second else None, (second or "trial", first), theme
        )
    }
    if shares := importances(study):
        plots["importance"] = figures.importance(shares, theme)
    numbers = [index for index, trial in enumerate(measured) if trial in winners]
    scores = np.array([p[0] for p in points(measured, search)])
    plots["parallel"] = figures.parallel(_columns(measured, search, study), scores, numbers, theme)
    return plots


def _columns(trials: Sequence[Tried], search: Search, study: Study) -> list[Column]:
    columns = []
    for key in study.space:
        values = [trial.values[key] for trial in trials]
        if all(isinstance(value, int | float) for value in values):
            columns.append(_numbers(short(key), np.array(values, dtype=float), log=study.logarithmic(key)))
        else:
            names = sorted({str(value) for value in values})
            places = {name: index / max(1, len(names) - 1) for index, name in enumerate(names)}
            heights = np.array([places[str(value)] for value in values])
            columns.append(Column(short(key), heights, [(place, name) for name, place in places.items()]))
    for metric in search.metrics:
        columns.append(_numbers(metric, np.array([trial.scores[metric] for trial in trials]), log=False))
    return columns


def _numbers(name: str, values: np.ndarray, *, log: bool) -> Column:
    scaled = np.log(values) if log else values
    low, high = scaled.min(), scaled.max()
    heights = (scaled - low) / (high - low) if high > low else np.full(len(values), 0.5)
    ends = {0.0: values.min(), 1.0: values.max()} if high > low else {0.5: values[0]}
    return Column(name, heights, [(place, f"{value:.3g}") for place, value in ends.items()])


def _row(trial: Tried, study: Study, winners: Sequence[Tried], errors: Mapping[int, str]) -> dict[str, Any]:
    broken = [name for name, missed in trial.violations.items() if missed > 0]
    return {
        "number": trial.number,
        "state": trial.state,
        "note": errors.get(trial.number) or ("breaks " + ", ".join(broken) if broken else ""),
        "wins": trial in winners,
        "values": [shown(trial.values[key]) for key in study.space],
        "scores": [f"{trial.scores[m]:.4g}" if m in trial.scores else "" for m in study.search.metrics],
    }
