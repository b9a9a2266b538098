"""PickScore: a CLIP fine-tuned on people's choices between two images of a prompt (Kirstain et al. 2023)."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from craftor_rewards.clip import ClipReward
from craftor_rewards.protocol import Range


class PickScore(ClipReward):
    """`exp(logit_scale)` times the cosine: differences of scores are log-odds of being chosen."""

    score_range: Range = "-exp(s) to exp(s), s the CLIP's logit scale; v1: about 18 to 24"

    def forward(self, images: Float[Tensor, "b 3 H W"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        return self.towers.clip.logit_scale.exp() * self.cosines(images, prompts)
