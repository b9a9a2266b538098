"""Scored images -> what they say: paired statistics, diversity, the interpolation curve, and each category's share."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from craftor.evaluation_files import BOOKKEEPING, STRIP_WEIGHTS
from craftor.statistics import holm, mean, paired, sign_flip

DETAILS = ("count", "shape", "colour", "size", "position", "background", "texture")


def summarise(
    images: Sequence[dict[str, Any]], trained: Collection[str], others: Mapping[str, Collection[str]] | None = None
) -> dict[str, Any]:
    """Paired statistics over prompts and seeds, diversity within prompts, and the interpolation curve.

    `others` are further methods with the metrics that they choose by: compared with the base, too, under `methods`.
    """
    summary = {"metrics": against_base(images, "tuned", trained), "interpolation": interpolation(images, "tuned")}
    if others:
        summary["methods"] = {name: against_base(images, name, known) for name, known in others.items()}
    return summary


def interpolation(images: Sequence[dict[str, Any]], variant: str) -> list[dict[str, float]]:
    """Every metric's mean by weight, from the base to a variant, over the prompts that have the weights between."""
    names = [key for key in images[0] if key not in BOOKKEEPING]
    strips = {i["number"] for i in images if i["variant"] == f"w{STRIP_WEIGHTS[1]}"}
    curve = []
    for weight, made in zip(STRIP_WEIGHTS, strip_of(variant), strict=True) if strips else ():
        at = [i for i in images if (i["seed"], i["variant"]) == (0, made) and i["number"] in strips]
        means = {name: float(np.nanmean([_number(image[name]) for image in at])) for name in names}
        curve.append({"weight": weight, "reward": means["total"], **means})
    return curve


def strip_of(variant: str) -> list[str]:
    """Names of the images with each of `STRIP_WEIGHTS`, from the base to a variant."""
    return ["base", *(f"w{w}" for w in STRIP_WEIGHTS[1:-1]), variant]


def against_base(images: Sequence[dict[str, Any]], variant: str, trained: Collection[str]) -> dict[str, dict[str, Any]]:
    """By metric, what `statistics.paired` says of a variant, and whether the metric was `held_out` of its training."""
    metrics = {}
    for name in (key for key in images[0] if key not in BOOKKEEPING):
        base, other = (grid(images, which, name) for which in ("base", variant))
        if np.isnan(base).all():
            continue  # an attribute that none of these prompts mentions
        metrics[name] = {**paired(base, other), "held_out": name not in trained}
    spread = diversity(images, "base")
    if not np.isnan(spread).all():  # one image a prompt has no diversity
        metrics["diversity"] = {**paired(spread, diversity(images, variant)), "held_out": True}
    return metrics


def breakdown(images: Sequence[dict[str, Any]], columns: Sequence[str]) -> list[dict[str, Any]]:
    """For the whole suite and each category of each column, every metric: means, their change, and how sure it is.

    `p` is of a sign-flip test over prompts, `p_holm` corrected for all rows of the result together.
    """
    groups = [("", "all", list(images))]
    for position, column in enumerate(columns):
        for category in dict.fromkeys(image["categories"][position] for image in images):
            groups.append((column, category, [i for i in images if i["categories"][position] == category]))
    names = [key for key in images[0] if key not in (*BOOKKEEPING, *DETAILS)]
    rows = []
    for column, category, members in groups:
        pairs = {name: tuple(grid(members, variant, name) for variant in ("base", "tuned")) for name in names}
        pairs["diversity"] = (diversity(members, "base"), diversity(members, "tuned"))
        for name, (base, tuned) in pairs.items():
            if np.isnan(base).all():
                continue
            rows.append(
                {"column": column, "category": category, "metric": name, "num_prompts": len(base)}
                | {"base_ci95": mean(base)["ci95"], "tuned_ci95": mean(tuned)["ci95"]}
                | paired(base, tuned)
                | {"p": sign_flip(base, tuned)}
            )
    return [{**row, "p_holm": p} for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True)]


def grid(images: Sequence[dict[str, Any]], variant: str, name: str) -> np.ndarray:
    """Values as (prompts, seeds); `images` is ordered by prompt and seed."""
    num_seeds = 1 + max(image["seed"] for image in images)
    values = [_number(image[name]) for image in images if image["variant"] == variant]
    return np.array(values, dtype=float).reshape(-1, num_seeds)


def diversity(images: Sequence[dict[str, Any]], variant: str) -> np.ndarray:
    """1 - cosine between CLIP image embeddings, mean over the pairs of one prompt's seeds; (prompts, 1)."""
    num_seeds = 1 + max(image["seed"] for image in images)
    features = np.array([image["feature"] for image in images if image["variant"] == variant])
    features = features.reshape(-1, num_seeds, features.shape[-1])
    similarity = features @ features.transpose(0, 2, 1)
    pairs = np.triu_indices(num_seeds, k=1)
    if not len(pairs[0]):
        return np.full((len(features), 1), np.nan)
    return 1 - similarity[:, pairs[0], pairs[1]].mean(axis=1, keepdims=True)


def samples(images: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The kept pictures of each prompt's first seed: base, tuned, and the strip between where all of it is there."""
    pictures = {(i["number"], i["variant"]): i for i in images if i["seed"] == 0 and "image" in i}
    numbers = sorted({number for number, _ in pictures})
    variants = strip_of("tuned")
    return [
        {
            "prompt": pictures[n, "base"]["prompt"],
            "seed": 0,
            "base": pictures[n, "base"]["image"],
            "tuned": pictures[n, "tuned"]["image"],
            "strip": [pictures[n, v]["image"] for v in variants] if all((n, v) in pictures for v in variants) else None,
        }
        for n in numbers
    ]


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
