"""Scores -> loss: the only place where a sign is flipped."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor


def total(scores: Mapping[str, Float[Tensor, " b"]], weights: Mapping[str, float]) -> Float[Tensor, " b"]:
    """Weighted sum of the trained rewards, per sample (TextCraftor, equation 7, with higher better)."""
    return sum((weights[name] * scores[name] for name in weights), start=0 * next(iter(scores.values())))


def loss(score: Float[Tensor, " b"], weight: float) -> Float[Tensor, ""]:
    """One reward's share of the batch loss, `-weight * mean(score)`."""
    return -weight * score.mean()


def policy_loss(ratio: Float[Tensor, " b"], advantage: Float[Tensor, " b"], clip_range: float) -> Float[Tensor, " b"]:
    """Each sample's loss for one decision, `-min(r A, clip(r, 1 - c, 1 + c) A)` (PPO, Schulman et al. 2017).

    ratio: density of the decision under the policy that learns, over that under the policy that took it.
    """
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip_range, 1 + clip_range) * advantage)


def cotangent(weight: float, share: float, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, " b"]:
    """dL/d(score) of one reward, for `share` times the batch loss: `-share * weight / b` for each image."""
    score = images.new_zeros(len(images), dtype=torch.float32, requires_grad=True)
    (derivative,) = torch.autograd.grad(share * loss(score, weight), score)
    return derivative
