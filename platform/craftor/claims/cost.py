"""What a tuned encoder costs at inference: parameters, floating-point work and time, beside the base."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from craftor import seeds, trainable
from craftor.claims.effects import Verdict
from craftor.decode import decode
from craftor.denoise import Prompt, State
from craftor.diffuser import Diffuser, load
from craftor.embed import embed
from craftor.evaluation_actor import Tuned
from craftor.flops import counting
from craftor.mixture import Member, sample_mixture
from craftor.recipe import Recipe, Tuning

PROMPTS = ["a large red star", "a small blue ring", "two green squares", "a yellow circle"]
REPEATS, TOLERANCE = 15, 0.05


def measure(recipe: Recipe, tuned: Tuned) -> list[dict[str, Any]]:
    """Parts of claim C6: relative extra time, extra work (told), extra parameters of the model in use (told).

    The tuned run encodes every prompt twice, by both encoders: that is its one more text pass.
    """
    assert isinstance(recipe.task, Tuning)
    diffuser = load(recipe.model.model_copy(update={"precision": "fp32"}))
    parts = trainable.load(diffuser, Path(tuned.folder))
    own = {**diffuser.encoders, **{name: part for name, part in parts.items() if name != "unet"}}

    def generate(encoders: dict[str, nn.Module] | None) -> None:
        images(diffuser, recipe, encoders, tuned.steps)

    with counting() as plain:
        generate(None)
    with counting() as mixed:
        generate(own)
    work = mixed.get_total_flops() / plain.get_total_flops() - 1
    ratios = []
    for repeat in range(REPEATS):
        order = [None, own] if repeat % 2 else [own, None]  # neither is always first
        seconds = {}
        for encoders in order:
            started = time.perf_counter()
            generate(encoders)
            seconds[encoders is not None] = time.perf_counter() - started
        ratios.append(seconds[True] / seconds[False] - 1)
    low, high = _interval(np.array(ratios))
    larger = sum(p.numel() for p in own["text_encoder"].parameters()) - sum(
        p.numel() for p in diffuser.text_encoder.parameters()
    )
    exact: dict[str, Any] = {"rule": "told", "verdict": None}
    return [
        {"said": "extra time of four images, relative", "metric": "seconds", "rule": f"within ±{TOLERANCE:g}"}
        | {"effect": float(np.median(ratios)), "ci95": (low, high), "verdict": _verdict(low, high)},
        {"said": "extra floating-point work, relative: one more text pass", "metric": "operations"}
        | {"effect": work, "ci95": (work, work), **exact},
        {"said": "extra parameters of the encoder", "metric": "parameters"}
        | {"effect": float(larger), "ci95": (float(larger), float(larger)), **exact},
    ]


@torch.no_grad()
def images(
    diffuser: Diffuser, recipe: Recipe, own: dict[str, nn.Module] | None, steps: tuple[int, int]
) -> torch.Tensor:
    """Four images, by the base alone or with a tuned encoder in its steps."""
    assert isinstance(recipe.task, Tuning)
    guided, ids = diffuser.guided(recipe.task.rollout), diffuser.tokenize(PROMPTS)
    base = Prompt(embed(diffuser.encoders, ids), diffuser.null())
    members = [Member(Prompt(embed(own, ids), diffuser.null(own)), 1.0, range(*steps))] if own else []
    noise = State(seeds.normal(0, range(len(PROMPTS)), "cost", diffuser.latent_shape))
    return decode(diffuser.vae, sample_mixture(guided, noise, base, members, range(guided.num_steps)).latents)


def _verdict(low: float, high: float) -> Verdict:
    if high < TOLERANCE and low > -TOLERANCE:
        return "holds"
    return "does not hold" if low > TOLERANCE else "undecided"


def _interval(ratios: np.ndarray) -> tuple[float, float]:
    """Of the median, by bootstrap: one slow moment of the machine is no cost."""
    drawn = np.random.default_rng(0).integers(len(ratios), size=(10_000, len(ratios)))
    low, high = np.percentile(np.median(ratios[drawn], axis=1), (2.5, 97.5))
    return float(low), float(high)
