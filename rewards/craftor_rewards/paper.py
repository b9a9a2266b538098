"""Scores as TextCraftor computed them, to reproduce its figures beside the correct ones; never to train with.

Two things differ: images are made 224 pixels wide by average pooling, which no tower was trained on, and PickScore
compares every image with every prompt of the batch, so that an image's score depends on what it is scored with.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from craftor_rewards.aesthetic import Aesthetic
from craftor_rewards.clip import ClipReward
from craftor_rewards.pick_score import PickScore
from craftor_rewards.protocol import check_inputs


@torch.no_grad()
def paper_scores(
    reward: ClipReward | Aesthetic, images: Float[Tensor, "b 3 H W"], prompts: Sequence[str]
) -> Float[Tensor, " b"]:
    """One score per image; the mean over the batch is what the paper's code reports.

    CLIP and HPS: cosine of matched pairs. Aesthetic: its head. PickScore: mean over the batch's prompts. Without
    gradient.
    """
    check_inputs(images, prompts, needs_prompt=reward.needs_prompt)
    features = reward.towers.image_features(images, resize="average_pool")
    if isinstance(reward, Aesthetic):
        return reward.head(features)
    texts = reward.towers.text_features(prompts)
    if isinstance(reward, PickScore):
        return reward.towers.clip.logit_scale.exp() * (features @ texts.T).mean(1)
    return (features * texts).sum(1)
