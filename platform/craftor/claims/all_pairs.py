"""PickScore over all pairs of a batch, as TextCraftor's code averages it: claim C10 sets matched pairs against it."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from craftor_rewards.pick_score import PickScore
from craftor_rewards.protocol import check_inputs


class AllPairs(PickScore):
    """Each image's mean score with every prompt of its batch, so that all are pulled to the batch's mean prompt."""

    def forward(self, images: Float[Tensor, "b 3 H W"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        check_inputs(images, prompts)
        features, texts = self.towers.image_features(images), self.towers.text_features(prompts)
        return self.towers.clip.logit_scale.exp() * (features @ texts.T).mean(1)
