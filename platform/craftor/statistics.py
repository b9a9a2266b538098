"""Scores of the same prompts and noise before and after tuning -> mean difference, its interval and the win rate.

Images of one prompt share their difficulty, so the bootstrap resamples whole prompts: intervals then say how far the
result would move with other prompts, which is what a reader wants to know.
"""

import math
from collections.abc import Sequence

import numpy as np

_CHUNK = 2_000_000  # resampled prompts held at a time: 16 MB of indices, whatever the number of prompts


def paired(base: np.ndarray, tuned: np.ndarray, *, seed: int = 0, num_resamples: int = 10_000) -> dict:
    """Compare `(num_prompts, num_seeds)` scores pair by pair; a pair with a NaN on either side is left out.

    Returns `base` and `tuned` means, `delta`, `ci95` (percentile bootstrap over prompts), `win_rate` (ties count half)
    and `spread`, the standard deviation of the base scores, in which differences of unlike metrics can be compared.
    Raises ValueError for shapes that differ or where no pair is left.
    """
    base, tuned = np.asarray(base, dtype=np.float64), np.asarray(tuned, dtype=np.float64)
    if base.shape != tuned.shape or base.ndim != 2:
        raise ValueError(f"scores of shape {base.shape} and {tuned.shape}; allowed: both (num_prompts, num_seeds)")
    kept = ~(np.isnan(base) | np.isnan(tuned))
    if not kept.any():
        raise ValueError(f"no pair of scores among {base.shape[0]} prompts x {base.shape[1]} seeds: all are NaN")
    difference = np.where(kept, tuned - base, 0.0)
    low, high = _interval(difference.sum(1), kept.sum(1), np.random.default_rng(seed), num_resamples)
    before, after = base[kept], tuned[kept]
    return {
        "base": float(before.mean()),
        "tuned": float(after.mean()),
        "delta": float((after - before).mean()),
        "ci95": [low, high],
        "win_rate": float(((after > before) + 0.5 * (after == before)).mean()),
        "spread": float(before.std()),
    }


def mean(values: np.ndarray, *, seed: int = 0, num_resamples: int = 10_000) -> dict:
    """Mean of `(num_prompts, num_seeds)` scores and its `ci95`, over prompts; NaN is left out."""
    kept = ~np.isnan(values)
    sums = np.where(kept, values, 0.0).sum(1)
    return {
        "mean": float(values[kept].mean()),
        "ci95": list(_interval(sums, kept.sum(1), np.random.default_rng(seed), num_resamples)),
    }


def sign_flip(base: np.ndarray, tuned: np.ndarray, *, seed: int = 0, num_resamples: int = 10_000) -> float:
    """Two-sided p of "no difference" for paired scores: how often random signs of the prompts' sums reach the same.

    Without a difference, each prompt's could as well have had the other sign. At least 1 / (num_resamples + 1).
    """
    sums = np.nansum(tuned - base, axis=1)
    generator = np.random.default_rng(seed)
    rows = max(1, _CHUNK // len(sums))
    reached = 0
    for start in range(0, num_resamples, rows):
        shape = (min(start + rows, num_resamples) - start, len(sums))
        flipped = generator.choice([-1.0, 1.0], size=shape) @ sums
        reached += int((np.abs(flipped) >= abs(sums.sum()) * (1 - 1e-12)).sum())
    return (reached + 1) / (num_resamples + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for being several (Holm 1979): below a level, the chance of even one false finding is."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return corrected.tolist()


def excludes_zero(ci95: Sequence[float]) -> bool:
    """Whether an interval lies wholly on one side of zero."""
    return ci95[0] > 0 or ci95[1] < 0


def decimals(ci95: Sequence[float]) -> int:
    """Decimals worth showing: the interval's width to two digits, at most five decimals."""
    width = ci95[1] - ci95[0]
    return min(5, max(0, 1 - math.floor(math.log10(width)))) if width > 0 else 3


def _interval(
    sums: np.ndarray, counts: np.ndarray, generator: np.random.Generator, num_resamples: int
) -> tuple[float, float]:
    """2.5th and 97.5th percentile of the mean over resampled prompts, of those that have a pair at all."""
    sums, counts = sums[counts > 0], counts[counts > 0]
    rows = max(1, _CHUNK // len(sums))
    means = np.empty(num_resamples)
    for start in range(0, num_resamples, rows):
        stop = min(start + rows, num_resamples)
        drawn = generator.integers(len(sums), size=(stop - start, len(sums)))
        means[start:stop] = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)
