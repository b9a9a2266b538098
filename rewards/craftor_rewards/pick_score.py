"""PickScore: a CLIP fine-tuned on people's choices between two images of a prompt (Kirstain et al. 2023)."""

from collections.abc import Sequence
from pathlib import Path

from jaxtyping import Float
from torch import Tensor, nn

from craftor_rewards.clip import ClipTowers
from craftor_rewards.protocol import check_inputs


class PickScore(nn.Module):
    """`exp(logit_scale)` times the cosine: differences of scores are log-odds of being chosen."""

    differentiable = True
    needs_prompt = True

    def __init__(self, weights: str | Path) -> None:
        super().__init__()
        self.towers = ClipTowers(weights)
        self.eval().requires_grad_(False)

    def forward(self, images: Float[Tensor, "b 3 H W"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        check_inputs(images, prompts)
        cosines = (self.towers.image_features(images) * self.towers.text_features(prompts)).sum(-1)
        return self.towers.clip.logit_scale.exp() * cosines
