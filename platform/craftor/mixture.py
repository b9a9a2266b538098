"""Which embeddings each denoising step sees: the base encoder's, mixed with tuned ones inside their own windows.

Encoders learn different things at different timesteps (late ones style, middle ones alignment), so every member of a
mixture acts only where it was trained. Mixing is in output space: `e = sum_i w_i * E_i(prompt)`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from craftor.denoise import Guided, Prompt, State
from craftor.embed import mix


@dataclass(frozen=True)
class Member:
    """What a tuned encoder makes of the prompts, its weight in [0, 1] and the denoising steps in which it acts."""

    prompt: Prompt
    weight: float
    steps: range


def weights_at(members: Sequence[tuple[float, range]], at: int) -> list[float]:
    """The base's weight, which is what the active members leave, then each member's: 0 outside its range.

    Ranges and `at` count either denoising steps or timesteps.
    """
    weights = [weight if at in where else 0.0 for weight, where in members]
    return [1 - sum(weights), *weights]


def timesteps(window: tuple[int, int]) -> range:
    """An encoder's (first, last) timestep, first the noisier, as a range for `weights_at`."""
    first, last = window
    return range(last, first + 1)


def check_weights(members: Sequence[tuple[float, range]]) -> None:
    """Raises MixtureError unless each weight is in [0, 1], and so is what they leave to the base everywhere."""
    for weight, _ in members:
        if not (math.isfinite(weight) and 0 <= weight <= 1):
            raise MixtureError(f"a mixture's weight is {weight}, allowed: 0 to 1")
    # The sum can only be largest where some range begins.
    for at in {where.start for _, where in members if where}:
        total = sum(weights_at(members, at)[1:])
        if total > 1 + 1e-6:
            raise MixtureError(f"the weights that act together at {at} sum to {total:g}, allowed: up to 1")


class MixtureError(ValueError):
    """Weights that make no mixture."""


def prompt_at(base: Prompt, members: Sequence[Member], index: int) -> Prompt:
    """The mixture of denoising step `index`; the base has the weight that the active members leave."""
    weights = weights_at([(member.weight, member.steps) for member in members], index)
    if not any(weights[1:]):
        return base
    prompts = [base, *(member.prompt for member in members)]
    return Prompt(mix([p.condition for p in prompts], weights), mix([p.null for p in prompts], weights))


@torch.no_grad()
def sample_mixture(guided: Guided, state: State, base: Prompt, members: Sequence[Member], steps: range) -> State:
    """Run `steps`, each under its own mixture."""
    for index in steps:
        state = guided.step(state, prompt_at(base, members, index), index)
    return state
