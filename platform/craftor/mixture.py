"""Which embeddings each denoising step sees: the base encoder's, mixed with tuned ones inside their own windows.

Encoders learn different things at different timesteps (late ones style, middle ones alignment), so every member of a
mixture acts only where it was trained. Mixing is in output space: `e = sum_i w_i * E_i(prompt)`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from craftor.denoise import Guided
from craftor.embed import mix


@dataclass(frozen=True)
class Condition:
    """What one encoder makes of a batch of prompts and of the empty prompt."""

    embeds: Float[Tensor, "b n d"]
    null: Float[Tensor, "1 n d"]


@dataclass(frozen=True)
class Member:
    """A tuned encoder's condition, its weight in [0, 1] and the denoising steps in which it acts."""

    condition: Condition
    weight: float
    steps: range


def condition_at(base: Condition, members: Sequence[Member], index: int) -> Condition:
    """The mixture of denoising step `index`; the base has the weight that the active members leave."""
    active = [member for member in members if index in member.steps and member.weight != 0]
    if not active:
        return base
    weights = [1 - sum(member.weight for member in active), *(member.weight for member in active)]
    conditions = [base, *(member.condition for member in active)]
    return Condition(mix([c.embeds for c in conditions], weights), mix([c.null for c in conditions], weights))


@torch.no_grad()
def sample_mixture(
    guided: Guided,
    latents: Float[Tensor, "b c h w"],
    base: Condition,
    members: Sequence[Member],
    steps: range,
) -> Float[Tensor, "b c h w"]:
    """Run `steps`, each under its own mixture."""
    for index in steps:
        condition = condition_at(base, members, index)
        latents = guided.step(latents, condition.embeds, condition.null, index)
    return latents
