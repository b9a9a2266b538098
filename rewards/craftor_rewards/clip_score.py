"""CLIPScore: how well an image fits its prompt, as a cosine in [-1, 1] (Hessel et al. 2021, without their factor)."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from craftor_rewards.clip import ClipReward
from craftor_rewards.protocol import Range


class ClipScore(ClipReward):
    """cos(image, prompt). Values of different CLIPs are not comparable: a ViT-L/14's are about 0.2 to 0.3."""

    score_range: Range = (-1.0, 1.0)

    def forward(self, images: Float[Tensor, "b 3 H W"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        return self.cosines(images, prompts)
