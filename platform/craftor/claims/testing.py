"""What claims need, made once: every method trained with every seed, its images scored; then effects and verdicts.

Each run has a folder; one that is finished is left alone, one that was interrupted goes on, so the same command again
does what is missing. Runs follow each other, so that their times can be compared.
"""

import json
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from craftor.claims import grid, judging, making
from craftor.claims.declared import CLAIMS, Claim
from craftor.claims.methods import IMAGES, METHODS, SCORED_BY, Budget, recipe_of
from craftor.cluster import ray_session
from craftor.locate import locate
from craftor.quickstart import machine
from craftor.recipe import RecipeError
from craftor.run_files import write_json
from craftor_micro.pairs import write_pairs

PLAN, TIME, NUM_PAIRS = "budget.json", "seconds.json", 500


class ClaimsError(ValueError):
    """Claims that are not known, or a folder that holds the tests of another budget."""


def select(only: Sequence[str] | None) -> dict[str, Claim]:
    """The claims of these names, or all. Raises ClaimsError listing them."""
    if unknown := [name for name in only or () if name not in CLAIMS]:
        raise ClaimsError(f"claim {unknown[0]}: unknown; allowed: {', '.join(CLAIMS)}")
    return {name: claim for name, claim in CLAIMS.items() if not only or name in only}


def images_of(claim: Claim) -> set[str]:
    """Names of all that must be evaluated for a claim."""
    shown = {*claim.curves, *filter(None, [claim.strips]), *(["textcraftor"] if claim.cost else [])}
    return {name for part in claim.parts for name in part.images} | shown


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
    with _timed(out), ray_session(budget.workers):
        if "direct" in methods_of(needed) and budget.pairs is None and not making.pairs(budget, out).exists():
            model = recipe_of("direct", 0, budget, making.pairs(budget, out)).model.path
            write_pairs(Path(locate(model)), making.pairs(budget, out), num=NUM_PAIRS, seed=1)
        for seed in range(budget.num_seeds):
            for method in methods_of(needed):
                making.train_where_missing(method, seed, budget, out)
            making.score(needed, seed, budget, out)
            making.score_between(sorted({m for claim in possible.values() for m in claim.curves}), seed, budget, out)
        for claim in possible.values():
            for method in claim.grid:
                making.train_where_missing(method, grid.SEED, budget, out)
            grid.score(claim.grid, budget, out)
    return {
        "machine": machine(),
        "python": platform.python_version(),
        "budget": asdict(budget),
        "seconds": _spent(out),
        "claims": [
            judging.undecided(name, claim, refused[name])
            if name in refused
            else judging.judge(name, claim, budget, out)
            for name, claim in claims.items()
        ],
    }


def _refused(claims: Mapping[str, Claim], budget: Budget, out: Path) -> dict[str, str]:
    """Claims that cannot be tested here, with the reason, found before anything runs."""
    found = {}
    for name, claim in claims.items():
        try:
            for method in (SCORED_BY, *methods_of(images_of(claim)), *claim.grid):
                recipe_of(method, 0, budget, making.pairs(budget, out))
        except RecipeError as error:
            found[name] = str(error)
    return found


@contextmanager
def _timed(out: Path) -> Iterator[None]:
    """Adds what the block takes to what earlier calls took."""
    before, started = _spent(out), time.monotonic()
    try:
        yield
    finally:
        write_json(out / TIME, {"seconds": before + time.monotonic() - started})


def _spent(out: Path) -> float:
    """Seconds of training and scoring, of all calls so far that were not killed."""
    return json.loads((out / TIME).read_text())["seconds"] if (out / TIME).exists() else 0.0


def _same_budget(budget: Budget, out: Path) -> None:
    path, here = out / PLAN, asdict(budget)
    if path.exists() and (there := json.loads(path.read_text())) != here:
        differs = [f"{key} was {there.get(key)!r}, is {here[key]!r}" for key in here if there.get(key) != here[key]]
        raise ClaimsError(f"{out} holds tests with another budget: {'; '.join(differs)}; choose another --out")
    write_json(path, here)
