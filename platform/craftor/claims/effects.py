"""Scores of several training seeds -> an effect, its interval over seeds and prompts, and what may be said of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from craftor.evaluation_files import Evaluated
from craftor.evaluation_summary import diversity

Verdict = Literal["holds", "does not hold", "undecided"]
Rule = Literal["above", "not_below", "told"]
"""`above`: holds where the interval is above 0, does not hold where it is below. `not_below`: holds unless it is below.
`told`: shown, no part of the verdict."""


class NotMeasured(ValueError):
    """Images that have no score by a metric, as those outside the micro world have none by its referee."""


@dataclass(frozen=True)
class Effect:
    effect: float
    ci95: tuple[float, float]


def verdict_of(effect: Effect, rule: Rule) -> Verdict | None:
    """What one part says; None where it is only told."""
    low, high = effect.ci95
    if rule == "told":
        return None
    if high < 0:
        return "does not hold"
    return "holds" if low > 0 or rule == "not_below" else "undecided"


def together(verdicts: Sequence[Verdict | None]) -> Verdict:
    """A claim holds if all its parts do, and does not if one does not."""
    said = [verdict for verdict in verdicts if verdict is not None]
    if "does not hold" in said:
        return "does not hold"
    return "undecided" if "undecided" in said or not said else "holds"


def values(evaluated: Evaluated, variant: str, metric: str) -> np.ndarray:
    """Scores as (prompts, images of each), NaN where there is none. Raises NotMeasured."""
    about = evaluated.about
    images = [image for image in evaluated.images if image["variant"] == variant]
    if not images or (metric != "diversity" and metric not in images[0]):
        raise NotMeasured(f"{evaluated.folder} has no {metric} of {variant}")
    if metric == "diversity":
        return diversity(images, variant)
    # The weights between base and tuned are made of the first prompts and the first seed alone.
    found = np.full((about["prompts"]["num"], about["num_seeds"]), np.nan)
    for image in images:
        found[image["number"], image["seed"]] = np.nan if image[metric] is None else image[metric]
    return found


def contrast(terms: Sequence[tuple[float, np.ndarray]]) -> np.ndarray:
    """`sum_k c_k * scores_k` image by image, then each prompt's mean; NaN for prompts without an image of each."""
    sums = np.sum([coefficient * scores for coefficient, scores in terms], axis=0)
    kept = ~np.isnan(sums)
    with np.errstate(invalid="ignore"):
        return np.where(kept, sums, 0.0).sum(axis=1) / kept.sum(axis=1)


def crossed(differences: np.ndarray, *, seed: int = 0, num_resamples: int = 10_000) -> Effect:
    """The mean of `(training seeds, prompts)` differences, and the percentile bootstrap over both at once.

    Every seed saw the same prompts, so seeds and prompts are drawn each by themselves. With three seeds the interval
    knows of their spread, but understates it. Prompts without a number in some seed are left out; raises ValueError
    where none is left.
    """
    kept = differences[:, ~np.isnan(differences).any(axis=0)]
    num_seeds, num_prompts = kept.shape
    if not num_prompts:
        raise ValueError("no prompt has a number in every seed")
    generator = np.random.default_rng(seed)
    seeds = generator.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=num_resamples) / num_seeds
    prompts = generator.multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), size=num_resamples)
    means = np.einsum("rs,rs->r", seeds, prompts @ kept.T) / num_prompts
    low, high = np.percentile(means, (2.5, 97.5))
    return Effect(float(kept.mean()), (float(low), float(high)))
