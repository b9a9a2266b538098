"""The claims, one by one: what is said, what is compared by which metric, and the rule that decides.

A part's contrast weighs images by name, `NAME` those of a tuned model and `NAME:VARIANT` others made beside them
(`textcraftor:base`, `textcraftor:w0.5`). What is not trained has a name alone (`engineered`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from craftor.claims.effects import Rule

BASE = "textcraftor:base"


@dataclass(frozen=True)
class Part:
    said: str
    metric: str
    contrast: Mapping[str, float]
    rule: Rule = "above"

    @property
    def images(self) -> set[str]:
        """Names of what must be evaluated."""
        return {name.partition(":")[0] for name in self.contrast}


@dataclass(frozen=True)
class Claim:
    said: str
    parts: tuple[Part, ...]
    """The first is the one whose effect the table shows."""
    cost: bool = False
    """Whether the work and time of inference are measured, too."""
    curves: tuple[str, ...] = ()
    """Methods whose gain is shown as it grew, with the time to reach it."""
    curve_of: str = "preference"
    strips: str = ""
    """Images that are shown by weight, from base to tuned."""
    grid: tuple[str, ...] = ()
    """Methods that differ in their window, earlier ones first, which are shown by where they are used."""


def _over(one: str, other: str, metrics: Mapping[str, Rule]) -> tuple[Part, ...]:
    """One against the other by several metrics."""
    return tuple(Part(f"{one} − {other}, {name}", name, {one: 1, other: -1}, rule) for name, rule in metrics.items())


def _strictly_rising(metric: str, name: str) -> tuple[Part, ...]:
    """From the base to the tuned encoder, each weight above the one before."""
    ladder = {"0": f"{name}:base", **{w: f"{name}:w{w}" for w in ("0.25", "0.5", "0.75")}, "1": name}
    return tuple(
        Part(f"weight {high} − {low}, {metric}", metric, {ladder[high]: 1, ladder[low]: -1})
        for low, high in pairwise(ladder)
    )


_JUDGES: dict[str, Rule] = {"quality": "above", "preference": "above", "total": "above", "accuracy": "not_below"}
"""The exact scorer, the reward kept for evaluation, what was trained; and what must not be paid for it."""

CLAIMS: dict[str, Claim] = {
    "C1": Claim("A tuned text encoder beats the base", _over("textcraftor", BASE, _JUDGES)),
    "C2": Claim(
        "It beats direct fine-tuning on pairs, which gains little",
        (
            *_over("textcraftor", "direct", _JUDGES),
            Part("direct − base, quality", "quality", {"direct": 1, "direct:base": -1}, "told"),
            Part("direct − base, total", "total", {"direct": 1, "direct:base": -1}, "told"),
        ),
    ),
    "C3": Claim(
        "It beats prompt engineering on alignment with the original prompt",
        _over("textcraftor", "engineered", {"accuracy": "above", "clip": "above", "quality": "told"}),
    ),
    "C4": Claim(
        "It beats DDPO at equal compute",
        _over("preference", "ddpo", {"quality": "above", "preference": "above", "accuracy": "not_below"}),
        curves=("preference", "ddpo", "textcraftor", "direct"),
    ),
    "C5": Claim(
        "Text encoder and UNet together beat either alone",
        (
            *_over("both", "textcraftor", {"quality": "above", "total": "above"}),
            *_over("both", "unet", {"quality": "above", "total": "above"}),
        ),
    ),
    "C6": Claim("It costs nothing at inference", (), cost=True),
    "C7": Claim(
        "Interpolation is monotone control, and mixtures of single-reward encoders trade one reward for the other",
        (
            *_strictly_rising("aesthetic", "textcraftor"),
            Part("half and half − no CLIP, clip", "clip", {"half_and_half": 1, "no_clip": -1}),
            Part("half and half − CLIP alone, aesthetic", "aesthetic", {"half_and_half": 1, "clip_only": -1}),
        ),
        strips="textcraftor",
    ),
    "C8": Claim(
        "Without the CLIP term training collapses, with it not",
        (
            Part("with − without, accuracy", "accuracy", {"textcraftor": 1, "no_clip": -1}),
            Part("with − without, diversity", "diversity", {"textcraftor": 1, "no_clip": -1}),
            Part("with − base, diversity", "diversity", {"textcraftor": 1, BASE: -1}, "not_below"),
            Part("with − base, accuracy", "accuracy", {"textcraftor": 1, BASE: -1}, "not_below"),
        ),
    ),
    "C9": Claim(
        "Training 5 steps and using 15 is a good trade; late steps carry style, middle ones alignment; two windows win",
        (
            *_over("used_15", "textcraftor", {"preference": "above", "quality": "above", "accuracy": "not_below"}),
            *_over("used_10", "textcraftor", {"preference": "told", "quality": "told"}),
            *_over("textcraftor", "last_10", {"preference": "above", "quality": "told"}),
            *_over("textcraftor", "middle", {"quality": "above"}),
            *_over("middle", "textcraftor", {"accuracy": "above", "clip": "above"}),
            *_over("two_windows", "textcraftor", {"accuracy": "above"}),
            *_over("two_windows", "middle", {"quality": "above"}),
        ),
        grid=("first", "middle", "later", "textcraftor", "first_10", "middle_10", "last_10"),
    ),
    "C10": Claim(
        "Matched pairs mend what PickScore over all pairs breaks; the gain is mostly the empty prompt's",
        (
            *_over("preference", "all_pairs", {"accuracy": "above", "diversity": "above", "clip": "told"}),
            Part(
                "gain − twice the gain without tuning the empty prompt, quality",
                "quality",
                {"textcraftor": 1, "original_null": -2, BASE: 1},
            ),
        ),
    ),
}
