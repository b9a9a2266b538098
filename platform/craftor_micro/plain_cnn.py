"""A plain convolutional classifier of scenes, for an object encoder to see by instead of a CLIP.

It has as many weights as the image tower of the reward's CLIP (374 against 370 thousand), and as many tokens (8x8) of
the same width; it was taught a scene's attributes by labels, where a CLIP learns from captions. It shares no weight,
seed or image with the referee.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetModel

from craftor_micro.pool import Pool
from craftor_micro.referee import HEADS, targets
from craftor_micro.render import IMAGE_SIZE
from craftor_rewards.preprocess import IMAGENET_MEAN, IMAGENET_STD, preprocess


class PlainCnn(nn.Module):
    """A `ResNetModel`, and linear heads of the attributes on its mean over cells, that are of use in training alone."""

    def __init__(self) -> None:
        super().__init__()
        widths = [64, 96]
        config = ResNetConfig(
            embedding_size=32, hidden_sizes=widths, depths=[1, 2], layer_type="basic", image_size=IMAGE_SIZE
        )
        self.resnet = ResNetModel(config)
        self.heads = nn.Linear(widths[-1], sum(HEADS.values()))

    def forward(self, images: Float[Tensor, "b 3 64 64"]) -> dict[str, Float[Tensor, "b _"]]:
        pixels = preprocess(images, IMAGE_SIZE, mean=IMAGENET_MEAN, std=IMAGENET_STD)
        outputs = self.heads(self.resnet(pixels).pooler_output.flatten(1))
        return dict(zip(HEADS, outputs.split(list(HEADS.values()), dim=1), strict=True))

    @torch.no_grad()
    def scores(self, pool: Pool) -> dict[str, float]:
        """Shares of a pool's first objects and backgrounds that it reads right."""
        read, right = self(pool.batch(torch.arange(len(pool)))), targets(pool.scenes)
        names = ("shape0", "colour0", "background", "texture")
        return {name: (read[name].argmax(1) == right[name]).float().mean().item() for name in names}
