"""Rewards by name. `build("clip_score", folder)` gives a frozen, differentiable `Reward`."""

from collections.abc import Callable
from pathlib import Path

from craftor_rewards.aesthetic import Aesthetic
from craftor_rewards.clip_score import ClipScore
from craftor_rewards.pick_score import PickScore
from craftor_rewards.protocol import Reward

REWARDS: dict[str, Callable[[str | Path], Reward]] = {
    "clip_score": ClipScore,
    "aesthetic": Aesthetic,
    "pick_score": PickScore,
}
__all__ = ["REWARDS", "Aesthetic", "ClipScore", "PickScore", "Reward", "build"]


def build(kind: str, weights: str | Path) -> Reward:
    """A reward of `REWARDS` with its weights from a folder or a Hugging Face repository."""
    if kind not in REWARDS:
        raise ValueError(f"unknown reward '{kind}'; available: {', '.join(REWARDS)}")
    return REWARDS[kind](weights)
