"""HPS v2 and v2.1: an open_clip ViT-H/14 fine-tuned on people's choices between images of a prompt (Wu et al. 2023)."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from craftor_rewards.clip import ClipReward
from craftor_rewards.preprocess import Clamp, Fit
from craftor_rewards.protocol import Range


class Hps(ClipReward):
    """The cosine, without a factor (benchmarks print it times 100). Comparable within a version and a prompt only.

    Unlike its relatives it sees the whole image, with black bars, and resized as a tensor: overshoot is not cut off.
    """

    score_range: Range = (-1.0, 1.0)
    fit: Fit = "letterbox"
    clamp: Clamp = "none"

    def forward(self, images: Float[Tensor, "b 3 H W"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        return self.cosines(images, prompts)
