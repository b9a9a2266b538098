"""ORACLE: the exact scorer itself as a reward. It shows how far a perfect reward would lead; no user has one.

A run trained by it is no evidence for anything but the training method: what judges it is what it was trained on.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from craftor_micro.captions import read_claims
from craftor_micro.referee import ATTRIBUTES, Referee


class RefereeAccuracy(nn.Module):
    """Share of what the prompt claims that the referee sees in the image, 0 to 1; 1 where its `accuracy` is 1.

    Steps of a share are easier to learn from than all or nothing. For prompts of the micro world alone: others raise
    ValueError, naming the word that is foreign to it.
    """

    differentiable = False
    needs_prompt = True
    input_size = 64
    fit = "none"
    score_range = (0.0, 1.0)

    def __init__(self, weights: str | Path) -> None:
        super().__init__()
        self.referee = Referee.load(weights)

    def forward(self, images: Float[Tensor, "b 3 64 64"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        verdicts = self.referee.judge(images, [read_claims(prompt) for prompt in prompts])
        return torch.stack([verdicts[name] for name in ATTRIBUTES]).nanmean(dim=0).to(images.device)
