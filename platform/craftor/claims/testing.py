"""What claims need, made once: every method trained with every seed, its images scored; then effects and verdicts.

Each run has a folder; one that is finished is left alone, one that was interrupted goes on, so the same command again
does what is missing. Runs follow each other, so that their times can be compared.
"""

import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from craftor import checkpoint, evaluation_files, watch
from craftor.claims import cost, curves
from craftor.claims.declared import CLAIMS, Claim, Part
from craftor.claims.effects import Effect, NotMeasured, contrast, crossed, together, values, verdict_of
from craftor.claims.methods import IMAGES, METHODS, Budget, changed, recipe_of
from craftor.cluster import ray_session
from craftor.evaluate import Asked, Tuned, evaluate, used_steps
from craftor.evaluation_files import Evaluated
from craftor.job import resume, train
from craftor.locate import absolute, locate
from craftor.quickstart import machine
from craftor.recipe import Recipe, RecipeError, Tuning, load_run
from craftor.run_files import write_json
from craftor_micro.pairs import write_pairs

PLAN, NUM_PAIRS = "budget.json", 500


class ClaimsError(ValueError):
    """Claims that are not known, or a folder that holds the tests of another budget."""


def select(only: Sequence[str] | None) -> dict[str, Claim]:
    """The claims of these names, or all. Raises ClaimsError listing them."""
    if unknown := [name for name in only or () if name not in CLAIMS]:
        raise ClaimsError(f"claim {unknown[0]}: unknown; allowed: {', '.join(CLAIMS)}")
    return {name: claim for name, claim in CLAIMS.items() if not only or name in only}


def images_of(claim: Claim) -> set[str]:
    """Names of all that must be evaluated for a claim."""
    return {name for part in claim.parts for name in part.images} | ({"textcraftor"} if claim.cost else set())


def methods_of(images: Iterable[str]) -> list[str]:
    """Those that must be trained for these images, in the order of `METHODS`."""
    needed = {method for name in images for method in IMAGES[name].methods}
    return [method for method in METHODS if method in needed]


def test(claims: Mapping[str, Claim], budget: Budget, out: Path) -> dict[str, Any]:
    """Make what is missing in `out` and judge; returns what `claims.json` holds.

    A claim whose recipes cannot be (one that is not there, a key this version lacks) is undecided, with the reason.
    Raises ClaimsError where `out` holds the tests of another budget.
    """
    out.mkdir(parents=True, exist_ok=True)
    _same_budget(budget, out)
    refused = _refused(claims, budget, out)
    possible = {name: claim for name, claim in claims.items() if name not in refused}
    needed = [name for name in IMAGES if any(name in images_of(claim) for claim in possible.values())]
    with ray_session(budget.workers):
        if "direct" in methods_of(needed) and budget.pairs is None and not _pairs(budget, out).exists():
            model = recipe_of("direct", 0, budget, _pairs(budget, out)).model.path
            write_pairs(Path(locate(model)), _pairs(budget, out), num=NUM_PAIRS, seed=1)
        for seed in range(budget.num_seeds):
            for method in methods_of(needed):
                _train(method, seed, budget, out)
            for name in needed:
                _evaluate(name, seed, budget, out)
    return {
        "machine": machine(),
        "python": platform.python_version(),
        "budget": asdict(budget),
        "claims": [
            _undecided(name, claim, refused[name]) if name in refused else judge(name, claim, budget, out)
            for name, claim in claims.items()
        ],
    }


def judge(name: str, claim: Claim, budget: Budget, out: Path) -> dict[str, Any]:
    """One claim's parts, its leading effect and its verdict, from what is in `out`."""

    @cache
    def read(images: str, seed: int) -> Evaluated:
        return evaluation_files.read(_images_dir(images, seed, out))

    parts, left_out = [], []
    for part in claim.parts:
        try:
            parts.append(_part(part, _effect(part, read, budget.num_seeds)))
        except NotMeasured:
            left_out.append(part.said)
    if claim.cost:
        recipe, folder = _run(out, "textcraftor", 0)
        parts += cost.measure(recipe, Tuned(folder, 1.0, used_steps(recipe)))
    if not parts:
        return _undecided(name, claim, f"not measured here: {', '.join(left_out)}")
    judged = {**_judged(name, claim, parts), "left_out": left_out}
    if claim.curves:
        runs = {method: [_run_dir(method, seed, out) for seed in range(budget.num_seeds)] for method in claim.curves}
        grown = {method: curves.curve(folders, claim.curve_of) for method, folders in runs.items()}
        curves.draw(out / f"{name}.png", claim.curve_of, grown)
        judged["time_to_reward"] = curves.time_to_reward(grown)
    return judged


def _effect(part: Part, read: Any, num_seeds: int) -> Effect:
    rows = []
    for seed in range(num_seeds):
        terms = []
        for term, coefficient in part.contrast.items():
            images, _, variant = term.partition(":")
            terms.append((coefficient, values(read(images, seed), variant or "tuned", part.metric)))
        rows.append(contrast(terms))
    return crossed(np.array(rows))


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


def _undecided(name: str, claim: Claim, reason: str) -> dict[str, Any]:
    said = {"id": name, "claim": claim.said, "effect": None, "ci95": None, "of": None, "verdict": "undecided"}
    return {**said, "command": f"craftor claims --only {name}", "parts": [], "reason": reason}


def _refused(claims: Mapping[str, Claim], budget: Budget, out: Path) -> dict[str, str]:
    """Claims that cannot be tested here, with the reason, found before anything runs."""
    found = {}
    for name, claim in claims.items():
        try:
            for method in methods_of(images_of(claim)):
                recipe_of(method, 0, budget, _pairs(budget, out))
            for images in images_of(claim):
                _asked_recipe(images, 0, budget, out)
        except RecipeError as error:
            found[name] = str(error)
    return found


def _train(method: str, seed: int, budget: Budget, out: Path) -> None:
    folder = _run_dir(method, seed, out)
    if not (folder / "recipe.toml").exists():
        train(recipe_of(method, seed, budget, _pairs(budget, out)), Path(f"claims: {method}"), folder)
    elif not _finished(folder):
        resume(folder)


def _finished(folder: Path) -> bool:
    last = checkpoint.latest(folder)
    done = checkpoint.step_of(last) if last else 0
    return done == load_run(folder).run.num_steps or (last is not None and watch.ended(folder) is not None)


def _evaluate(name: str, seed: int, budget: Budget, out: Path) -> None:
    """Score a method's images, or those of several mixed, by the first one's evaluation section."""
    folder, images = _images_dir(name, seed, out), IMAGES[name]
    if (folder / "summary.json").exists():
        return
    tuned = []
    for method, weight in zip(images.methods, images.weights, strict=True):
        recipe, checkpoint_folder = _run(out, method, seed)
        first, stop = used_steps(recipe)
        if images.use_from is not None:
            assert isinstance(recipe.task, Tuning)
            first = round(images.use_from * recipe.task.rollout.num_steps)
        tuned.append(Tuned(checkpoint_folder, weight, (first, stop)))
    asked = Asked(num_kept=8, num_strips=images.num_strips)
    evaluate(absolute(_asked_recipe(name, seed, budget, out)), tuned, folder, max(1, budget.workers), asked)


def _asked_recipe(name: str, seed: int, budget: Budget, out: Path) -> Recipe:
    """The recipe by which images are scored."""
    recipe = recipe_of(IMAGES[name].methods[0], seed, budget, _pairs(budget, out))
    changes = {f"evaluation.{key}": value for key, value in IMAGES[name].evaluation.items()}
    return changed(recipe.data_of(), changes, f"claims: images {name}") if changes else recipe


def _run(out: Path, method: str, seed: int) -> tuple[Recipe, str]:
    """A finished run's recipe and the folder of its last checkpoint."""
    folder = _run_dir(method, seed, out)
    last = checkpoint.latest(folder)
    assert last is not None, f"{folder} has been trained"
    return load_run(folder), str(last.resolve())


def _run_dir(method: str, seed: int, out: Path) -> Path:
    return out / f"{method}-{seed}"


def _images_dir(name: str, seed: int, out: Path) -> Path:
    return out / "images" / f"{name}-{seed}"


def _pairs(budget: Budget, out: Path) -> Path:
    return Path(budget.pairs) if budget.pairs else (out / "pairs").resolve()


def _same_budget(budget: Budget, out: Path) -> None:
    path, here = out / PLAN, asdict(budget)
    if path.exists() and (there := json.loads(path.read_text())) != here:
        differs = [f"{key} was {there.get(key)!r}, is {here[key]!r}" for key in here if there.get(key) != here[key]]
        raise ClaimsError(f"{out} holds tests with another budget: {'; '.join(differs)}; choose another --out")
    write_json(path, here)
