"""Which embeddings each denoising step sees: the base encoder's, mixed with tuned ones inside their own windows.

Encoders learn different things at different timesteps (late ones style, middle ones alignment), so every member of a
mixture acts only where it was trained. Mixing is in output space: `e = sum_i w_i * E_i(prompt)`.
"""

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


def prompt_at(base: Prompt, members: Sequence[Member], index: int) -> Prompt:
    """The mixture of denoising step `index`; the base has the weight that the active members leave."""
    active = [member for member in members if index in member.steps and member.weight != 0]
    if not active:
        return base
    weights = [1 - sum(member.weight for member in active), *(member.weight for member in active)]
    prompts = [base, *(member.prompt for member in active)]
    return Prompt(mix([p.condition for p in prompts], weights), mix([p.null for p in prompts], weights))


@torch.no_grad()
def sample_mixture(guided: Guided, state: State, base: Prompt, members: Sequence[Member], steps: range) -> State:
    """Run `steps`, each under its own mixture."""
    for index in steps:
        state = guided.step(state, prompt_at(base, members, index), index)
    return state
