"""Scored images of several training seeds -> a claim's parts, its leading effect, its verdict and its picture."""

from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from craftor.claims import cost, curves, grid, strips
from craftor.claims.declared import Claim, Part
from craftor.claims.effects import Effect, NotMeasured, contrast, crossed, together, values, verdict_of
from craftor.claims.making import last_of, read_images, run_dir, steps_between
from craftor.claims.methods import FEW_PROMPTS, Budget
from craftor.evaluate import Tuned, used_steps
from craftor.evaluation_files import Evaluated
from craftor.recipe import load_run


def judge(name: str, claim: Claim, budget: Budget, out: Path) -> dict[str, Any]:
    """One claim's parts, its leading effect and its verdict, from what is in `out`."""

    @cache
    def read(images: str, seed: int) -> Evaluated:
        return read_images(images, seed, out)

    parts, left_out = [], []
    for part in claim.parts:
        try:
            parts.append(_part(part, _effect(part, read, budget.num_seeds)))
        except NotMeasured:
            left_out.append(part.said)
    if claim.cost:
        recipe, folder = last_of(out, "textcraftor", 0)
        parts += cost.measure(recipe, Tuned(folder, 1.0, used_steps(recipe)))
    if not parts:
        return undecided(name, claim, f"not measured here: {', '.join(left_out)}")
    judged = {**_judged(name, claim, parts), "left_out": left_out}
    if claim.curves:
        grown = {method: _curve(method, claim.curve_of, budget, out) for method in claim.curves}
        curves.draw(out / f"{name}.png", claim.curve_of, grown)
        judged["time_to_reward"] = curves.time_to_reward(grown)
    if claim.grid:
        judged["grid"] = grid.measure(claim.grid, out)
        grid.draw(out / f"{name}.png", judged["grid"])
    if claim.strips:
        shown = [read(claim.strips, seed) for seed in range(budget.num_seeds)]
        strips.draw(out / f"{name}.png", shown, claim.strips, ("aesthetic", "quality", "clip", "accuracy"))
    return judged


def _effect(part: Part, read: Any, num_seeds: int) -> Effect:
    rows = []
    for seed in range(num_seeds):
        terms = []
        for term, coefficient in part.contrast.items():
            images, _, variant = term.partition(":")
            terms.append((coefficient, values(read(images, seed), variant or images, part.metric)))
        rows.append(contrast(terms))
    return crossed(np.array(rows))


def _curve(method: str, metric: str, budget: Budget, out: Path) -> curves.Curve:
    """Scores of the first prompts' first images, by the base, by the checkpoints before the last, and by that."""
    rows = []
    for seed in range(budget.num_seeds):
        steps = steps_between(method, seed, out)
        last = read_images(method, seed, out)
        between = [f"{method}-at-{step}" for step in steps]
        scores = [values(read_images(name, seed, out), name, metric) for name in between]
        all_of_it = (values(last, "base", metric), *scores, values(last, method, metric))
        rows.append([np.nanmean(each[:FEW_PROMPTS, 0]) for each in all_of_it])
    runs = [run_dir(method, seed, out) for seed in range(budget.num_seeds)]
    return curves.curve(runs, [*steps, load_run(runs[0]).run.num_steps], np.array(rows))


def _part(part: Part, effect: Effect) -> dict[str, Any]:
    said = {"said": part.said, "metric": part.metric, "rule": part.rule}
    return {**said, **asdict(effect), "verdict": verdict_of(effect, part.rule)}


def _judged(name: str, claim: Claim, parts: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": name,
        "claim": claim.said,
        "effect": parts[0]["effect"],
        "ci95": list(parts[0]["ci95"]),
        "of": parts[0]["said"],
        "verdict": together([part["verdict"] for part in parts]),
        "command": f"craftor claims --only {name}",
        "parts": [{**part, "ci95": list(part["ci95"])} for part in parts],
    }


def undecided(name: str, claim: Claim, reason: str) -> dict[str, Any]:
    said = {"id": name, "claim": claim.said, "effect": None, "ci95": None, "of": None, "verdict": "undecided"}
    return {**said, "command": f"craftor claims --only {name}", "parts": [], "reason": reason}
