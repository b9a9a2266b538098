"""CLIPScore: how well an image fits its prompt, as a cosine in [-1, 1] (Hessel et al. 2021, without their factor)."""

from collections.abc import Sequence
from pathlib import Path

from jaxtyping import Float
from torch import Tensor, nn

from craftor_rewards.clip import ClipTowers
from craftor_rewards.protocol import check_inputs


class ClipScore(nn.Module):
    """Cosine of matched pairs, never the batch's matrix: score i depends on image i and prompt i alone."""

    differentiable = True
    needs_prompt = True

    def __init__(self, weights: str | Path) -> None:
        super().__init__()
        self.towers = ClipTowers(weights)
        self.eval().requires_grad_(False)

    def forward(self, images: Float[Tensor, "b 3 H W"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        check_inputs(images, prompts)
        return (self.towers.image_features(images) * self.towers.text_features(prompts)).sum(-1)
