"""The history of a run's metrics -> whether to warn, stop or roll back, by the recipe's rules. Imports no torch.

Reward models are proxies: pushed too far, the images lose what no reward asked for. That shows in figures which cost
next to nothing, and a rule says how far one of them may move from where it started.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, model_validator

from craftor.rollout import Section

STATISTICS = ("saturated", "dark", "edge_density", "colour_entropy", "diversity", "prompt_diversity")
"""What `image_statistics` measures in the training images."""
OTHERS = ("loss", "total", "sharpness", "truncated", "drift", "grad_norm", "lr", "images_per_second")
Record = Mapping[str, float]
"""One line of `metrics.jsonl`; metrics that are taken at intervals are in some lines only."""


class Rule(Section):
    """A bound on one metric. Its readings are averaged over the last `over`, and bound once there are more."""

    metric: str
    """As it is called in `metrics.jsonl`."""
    below: float | None = None
    above: float | None = None
    """The rule is broken while the metric is below, or above, this."""
    of: Literal["start", "best"] | None = None
    """The bound is a share of the metric's start (its first `over` readings) or of its best average so far."""
    action: Literal["warn", "stop", "roll_back"] = "warn"
    """`stop` ends the run as failed, its checkpoints kept. `roll_back` ends it with the best checkpoint: the last one
    from before the rule was broken, for earlier ones learnt less and later ones are spoilt."""
    patience: int = Field(3, ge=1)
    """Act when so many readings in a row break the rule."""
    over: int = Field(5, ge=1)

    @model_validator(mode="after")
    def _one_bound(self) -> "Rule":
        if (self.below is None) == (self.above is None):
            raise ValueError(f"below is {self.below} and above is {self.above}; give one of them")
        return self

    def bound(self, reference: float | None) -> float:
        """What the average is compared with. A share of a negative reference is as far from it, on the same side."""
        share = self.below if self.below is not None else self.above
        assert share is not None
        return share if reference is None else reference + (share - 1) * abs(reference)


DEFAULTS = (
    Rule(metric="colour_entropy", below=0.6, of="start"),
    Rule(metric="edge_density", below=0.5, of="start"),
    Rule(metric="edge_density", above=2.0, of="start"),
    Rule(metric="diversity", below=0.6, of="start"),
    Rule(metric="saturated", above=0.6),
    Rule(metric="dark", above=0.8),
    Rule(metric="sharpness", above=4.0, of="start"),
)


class Guards(Section):
    """What watches over a run that tunes by reward. Without the section the default rules warn."""

    rules: Annotated[tuple[Rule, ...], Field(strict=False)] = DEFAULTS
    """These replace the default ones; an empty list has none."""
    sharpness_every: int = Field(10, ge=0)
    """Steps between measurements of the rewards' sharpness, each of which scores once more; 0 never measures it."""
    sharpness_radius: float = Field(0.01, gt=0, le=1)
    """Root mean square of the change of the image that it looks at, in the pixels' [0, 1]."""


@dataclass(frozen=True)
class Verdict:
    """What a rule says after the last line of a history."""

    step: int
    metric: str
    action: str
    reason: str
    last_good_step: int
    """The step before the first of the readings that broke the rule."""


def verdict(rules: Sequence[Rule], history: Sequence[Record]) -> Verdict | None:
    """The gravest rule that the last line of the history makes act: roll_back before stop before warn.

    A rule that ends the run acts from its `patience` on; a warning is given once for readings in a row that break it.
    """
    order = {"roll_back": 0, "stop": 1, "warn": 2}
    found = [judged for rule in sorted(rules, key=lambda rule: order[rule.action]) if (judged := _judge(rule, history))]
    return found[0] if found else None


def _judge(rule: Rule, history: Sequence[Record]) -> Verdict | None:
    if not history or rule.metric not in history[-1]:
        return None
    lines = [line for line in history if rule.metric in line]
    values = [line[rule.metric] for line in lines]
    streak = 0
    while len(values) - streak > rule.over and _is_broken(rule, values, len(values) - streak):
        streak += 1
    if streak < rule.patience or (rule.action == "warn" and streak > rule.patience):
        return None
    average, bound, since = (
        _average(rule, values, len(values)),
        _bound(rule, values, len(values)),
        lines[-streak]["step"],
    )
    side, share = ("below", rule.below) if rule.below is not None else ("above", rule.above)
    reference = f" ({share:g} of its {rule.of})" if rule.of else ""
    return Verdict(
        step=int(lines[-1]["step"]),
        metric=rule.metric,
        action=rule.action,
        reason=f"{rule.metric} is {average:.4g}, {side} {bound:.4g}{reference}, since step {since:.0f}",
        last_good_step=int(since) - 1,
    )


def _is_broken(rule: Rule, values: Sequence[float], end: int) -> bool:
    average, bound = _average(rule, values, end), _bound(rule, values, end)
    return average < bound if rule.below is not None else average > bound


def _average(rule: Rule, values: Sequence[float], end: int) -> float:
    """Mean of the last readings before `end`."""
    return sum(values[end - rule.over : end]) / rule.over


def _bound(rule: Rule, values: Sequence[float], end: int) -> float:
    """What the average at `end` is compared with, from the averages before it."""
    if rule.of is None:
        return rule.bound(None)
    if rule.of == "start":
        return rule.bound(_average(rule, values, rule.over))
    best = max if rule.below is not None else min
    return rule.bound(best(_average(rule, values, earlier) for earlier in range(rule.over, end)))
