"""Trials -> which of them win. Pure."""

from collections.abc import Sequence

from craftor.searching.settings import Search
from craftor.searching.study import Tried


class NothingFound(RuntimeError):
    """A search without a winner; the message says why."""


def points(trials: Sequence[Tried], search: Search) -> list[list[float]]:
    """By trial, its objectives, signed so that more is better."""
    return [[o.sign * trial.scores[o.metric] for o in search.objectives] for trial in trials]


def front(trials: Sequence[Tried], search: Search) -> list[Tried]:
    """The eligible trials that no other eligible one beats in all objectives, best in the first objective first.

    With one objective that is the best trial, the earliest of equals.
    """
    eligible = [trial for trial in trials if trial.eligible]
    scored = list(zip(eligible, points(eligible, search), strict=True))
    kept = [trial for trial, mine in scored if not any(_beats(theirs, mine) for _, theirs in scored)]
    ranked = sorted(kept, key=lambda trial: (*(-p for p in points([trial], search)[0]), trial.number))
    return ranked if len(search.objectives) > 1 else ranked[:1]


def require_front(trials: Sequence[Tried], search: Search, errors: Sequence[str], folder: object) -> list[Tried]:
    """Raises NothingFound where every trial failed, or none met the constraints."""
    if found := front(trials, search):
        return found
    if trials and all(trial.state == "failed" for trial in trials):
        raise NothingFound(f"all {len(trials)} trials failed; the first with: {errors[0]}; see {folder}")
    finished = [trial for trial in trials if trial.state == "finished"]
    if not finished:
        raise NothingFound(f"no trial of {len(trials)} ran to its end; see {folder}")
    nearest = min(finished, key=lambda trial: max(trial.violations.values()))
    broken = ", ".join(f"{name} by {missed:.3g}" for name, missed in nearest.violations.items() if missed > 0)
    raise NothingFound(
        f"none of {len(finished)} finished trials meets the constraints; trial {nearest.number} comes nearest and "
        f"misses {broken}; nothing is registered; see {folder}"
    )


def reason(search: Search) -> str:
    """What a winner was chosen by, for people."""
    wanted = ", ".join(f"{o.direction} {o.metric}" for o in search.objectives)
    kept = f" with {', '.join(c.name for c in search.constraints)}" if search.constraints else ""
    return wanted + kept


def _beats(theirs: Sequence[float], mine: Sequence[float]) -> bool:
    pairs = list(zip(theirs, mine, strict=True))
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)
