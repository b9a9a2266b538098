"""The `[search]` section of a recipe: what varies, what counts, and who chooses the next trial. Imports no torch."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from craftor.rollout import Section

MEASURED = (
    *("quality", "accuracy", "diversity"),
    *("count", "shape", "colour", "size", "position", "background", "texture"),
)
"""What evaluation measures besides the rewards. All but `diversity` is the referee's, who needs the prompts'
descriptions."""

COMMON = ("name", "seed", "model", "register", "evaluation", "search", "task.kind", "task.rollout")
"""What all trials have in common: they are judged by it, on one base."""

Number = int | float
Value = bool | int | float | str


class Distribution(Section):
    """What one key may be: a range, whole where both ends are, or a list."""

    low: Number | None = None
    high: Number | None = None
    log: bool = False
    """Draw the logarithm uniformly."""
    choices: Annotated[tuple[Value, ...], Field(strict=False, min_length=1)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "Distribution":
        if (self.low is None) != (self.high is None) or (self.low is None) == (self.choices is None):
            raise ValueError("expected { low, high } or { choices = [...] }")
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise ValueError(f"low = {self.low} is not below high = {self.high}")
        if self.log and (self.low is None or self.low <= 0):
            raise ValueError(f"log = true goes with low > 0 (got {self.low})")
        return self

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def ends(self) -> tuple[Value, ...]:
        """The values whose recipes are checked before any trial starts."""
        if self.choices is not None:
            return self.choices
        assert self.low is not None and self.high is not None
        return (self.low, self.high) if self.whole else (float(self.low), float(self.high))

    @property
    def values(self) -> tuple[Value, ...] | None:
        """Every value, where they can be listed."""
        if self.choices is None and not self.whole:
            return None
        return self.choices or tuple(range(int(self.ends[0]), int(self.ends[1]) + 1))

    def __contains__(self, value: Value) -> bool:
        if self.choices is not None:
            return value in self.choices
        assert self.low is not None and self.high is not None
        return not isinstance(value, str) and self.low <= value <= self.high


class Objective(Section):
    metric: str
    direction: Literal["maximize", "minimize"] = "maximize"

    @property
    def sign(self) -> int:
        """What makes more of it better."""
        return 1 if self.direction == "maximize" else -1


class Constraint(Section):
    metric: str
    at_least: float | None = None
    at_most: float | None = None
    relative_to_base: bool = False
    """The bound is a factor of what the base model scores."""

    @model_validator(mode="after")
    def _one_bound(self) -> "Constraint":
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError(f"give at_least or at_most for {self.metric}")
        return self

    @property
    def name(self) -> str:
        relation, bound = (">=", self.at_least) if self.at_most is None else ("<=", self.at_most)
        return f"{self.metric} {relation} {bound:g}{' x base' if self.relative_to_base else ''}"

    def violation(self, score: float, base: float) -> float:
        """By how much the bound is missed; 0 or less where it is met."""
        scale = base if self.relative_to_base else 1.0
        return score - self.at_most * scale if self.at_most is not None else (self.at_least or 0.0) * scale - score


class Asha(Section):
    """Asynchronous successive halving (Li et al. 2020): of the trials that reached a rung, the better ones go on."""

    every: int = Field(ge=1)
    """Optimiser steps between evaluations; the first rung is the first of them."""
    reduction_factor: float = Field(2.0, gt=1)
    """One in so many goes on from a rung, and rungs lie so many times further apart."""
    num_prompts: int = Field(32, ge=2)
    """Of the search's prompts, for evaluations before the last."""


class Mix(Section):
    """What `craftor search-mix` draws for each encoder."""

    num_trials: int = Field(200, ge=1)
    max_weight: float = Field(1.0, gt=0)
    num_prompts: int | None = Field(None, ge=2)
    """Of the search's prompts, for each mixture; by default all."""
    earliest: int = Field(0, ge=0)
    """The first denoising step in which a tuned encoder may act."""


class Search(Section):
    space: dict[str, Distribution] = Field(min_length=1)
    """By dotted key of this recipe; the `task.` in front may be left out, and `*` stands for every entry with a value
    there: `rewards.*.weight` for the weight of each trained reward."""
    objectives: Annotated[tuple[Objective, ...], Field(strict=False, min_length=1)]
    constraints: Annotated[tuple[Constraint, ...], Field(strict=False)] = ()
    """A trial that breaks one never wins."""
    num_trials: int = Field(ge=1)
    searcher: Literal["tpe", "nsga2", "random", "grid"] = "tpe"
    asha: Asha | None = None
    """Stop trials whose first objective falls behind; without it all run to their end."""
    concurrent: int = Field(1, ge=1)
    """Trials at a time; each has the workers of `[workers]`."""
    resources: dict[str, float] | None = None
    """What each of a trial's workers reserves, by Ray's names: `{ CPU = 4, GPU = 0.5 }`; by default one CPU, or with
    `workers.gpu` one GPU."""
    prompts: str
    """JSONL with a `prompt` and, for what the referee measures, a `description`; none held out in `[evaluation]`."""
    num_prompts: int = Field(96, ge=2)
    num_seeds: int = Field(2, ge=1)
    share_prefix: bool = True
    """Compute the denoising steps before the windows once, for all trials."""
    mix: Mix = Mix()

    @property
    def metrics(self) -> tuple[str, ...]:
        named = [*(o.metric for o in self.objectives), *(c.metric for c in self.constraints)]
        return tuple(dict.fromkeys(named))

    @model_validator(mode="after")
    def _consistent(self) -> "Search":
        if self.searcher == "grid" and (open_ended := [key for key, d in self.space.items() if d.values is None]):
            raise ValueError(f'searcher = "grid": {open_ended[0]} has no list of values; give it choices')
        if "diversity" in self.metrics and self.num_seeds < 2:
            raise ValueError("diversity is measured between the images of one prompt: num_seeds = 2 or more")
        for name, part in (("asha", self.asha), ("mix", self.mix)):
            asked = part.num_prompts if part is not None else None
            if asked is not None and asked > self.num_prompts:
                raise ValueError(f"{name}.num_prompts = {asked} is more than num_prompts = {self.num_prompts}")
        return self


def expand(
    space: Mapping[str, Distribution], data: Mapping[str, Any], sections: Sequence[str]
) -> dict[str, Distribution]:
    """Full dotted keys of a recipe's data. Raises ValueError for a `*` that fits nothing and for `COMMON` keys."""
    expanded: dict[str, Distribution] = {}
    for key, distribution in space.items():
        parts = key.split(".")
        found = list(_matches(data, parts if parts[0] in sections else ["task", *parts]))
        if not found:
            raise ValueError(f"search.space: {key} stands for nothing in this recipe")
        expanded |= {".".join(path): distribution for path in found}
    for key in expanded:
        if fixed := [common for common in COMMON if key == common or key.startswith(f"{common}.")]:
            raise ValueError(f"search.space: {key}: trials have {fixed[0]} in common")
    return expanded


def _matches(data: Any, parts: Sequence[str]) -> Iterator[list[str]]:
    if "*" not in parts:
        yield list(parts)
        return
    star = parts.index("*")
    before, after = parts[:star], parts[star + 1 :]
    inside = get(data, before)
    for name in inside if isinstance(inside, Mapping) else ():
        for rest in _matches(inside[name], after):
            if not after or get(inside[name], rest):
                yield [*before, name, *rest]


def get(data: Any, parts: Sequence[str]) -> Any:
    """The value at a path, or None."""
    for part in parts:
        data = data.get(part) if isinstance(data, Mapping) else None
    return data


def substitute(data: Mapping[str, Any], values: Mapping[str, Value]) -> dict[str, Any]:
    """A trial's recipe as data: that of the search, without its `[search]`, with `values` at their dotted keys.

    Raises ValueError where a key leads through a value.
    """
    changed = copy.deepcopy({name: section for name, section in data.items() if name != "search"})
    for key, value in values.items():
        *parents, last = key.split(".")
        inside: Any = changed
        for parent in parents:
            inside = inside.setdefault(parent, {})
            if not isinstance(inside, dict):
                raise ValueError(f"search.space: {key}: {parent} is a value, not a section")
        inside[last] = value
    return changed


def corners(space: Mapping[str, Distribution]) -> Iterator[dict[str, Value]]:
    """Values to check recipes with: each key at each of its ends, and all at their first and at their last."""
    for key, distribution in space.items():
        yield from ({key: value} for value in distribution.ends)
    for end in (0, -1):
        yield {key: distribution.ends[end] for key, distribution in space.items()}
