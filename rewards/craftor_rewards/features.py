"""Images -> DINO or DINOv2 features, which tell objects and looks apart without words (Caron 2021, Oquab 2023).

No reward by themselves: they measure how far the images of one prompt differ, and how alike two images of a thing are.
Where a CLIP is at hand instead, its image tower serves.
"""

from collections.abc import Hashable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig, Dinov2Model, ViTModel

from craftor_rewards.clip import ClipTowers
from craftor_rewards.loading import find
from craftor_rewards.preprocess import IMAGENET_MEAN, IMAGENET_STD, preprocess
from craftor_rewards.protocol import check_inputs

RESIZED, CROPPED = 256, 224
MODELS = {"vit": partial(ViTModel.from_pretrained, add_pooling_layer=False), "dinov2": Dinov2Model.from_pretrained}


class DinoFeatures(nn.Module):
    """A frozen `facebook/dino-vits16` (`ViTModel`), `facebook/dinov2-base` (`Dinov2Model`), or a relative of theirs."""

    def __init__(self, weights: str | Path, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        path = find(weights)
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"'{path}' lacks a DINO: expected config.json and model.safetensors")
        kind = AutoConfig.from_pretrained(path).model_type
        if kind not in MODELS:
            raise ValueError(f"'{weights}' is a '{kind}' model; available: {', '.join(MODELS)}")
        self.model, info = MODELS[kind](path, dtype=dtype, output_loading_info=True)
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"'{weights}' lacks {len(missing)} tensors of a '{kind}', first '{missing[0]}'")
        self.width: int = self.model.config.hidden_size
        self.dtype = dtype
        self.eval().requires_grad_(False)

    def forward(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b d"]:
        """Unit vectors: the class token after the last norm.

        As both were evaluated: shorter side to 256, the middle 224, ImageNet's mean and spread. The margin that is cut
        off has no gradient.
        """
        check_inputs(images, [""] * len(images), needs_prompt=False)
        margin = (RESIZED - CROPPED) // 2
        pixels = preprocess(images, RESIZED, fit="crop_torchvision", mean=IMAGENET_MEAN, std=IMAGENET_STD)
        pixels = pixels[:, :, margin : margin + CROPPED, margin : margin + CROPPED]
        return F.normalize(self.model(pixel_values=pixels.to(self.dtype)).last_hidden_state[:, 0].float(), dim=-1)


class ClipFeatures(nn.Module):
    """A CLIP's image tower, frozen, in DINO's place."""

    def __init__(self, weights: str | Path) -> None:
        super().__init__()
        self.towers = ClipTowers(weights, text=False)

    def forward(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b d"]:
        """Unit vectors."""
        return self.towers.image_features(images)


def build_features(weights: str | Path) -> nn.Module:
    """`DinoFeatures` or `ClipFeatures`, by what the weights say they are: images in [0, 1] -> unit vectors."""
    path = find(weights)
    if path.is_file() or ((path / "config.json").is_file() and AutoConfig.from_pretrained(path).model_type == "clip"):
        return ClipFeatures(path)
    return DinoFeatures(path)


def pairwise_diversity(features: Float[Tensor, "n d"], groups: Sequence[Hashable]) -> Float[Tensor, " g"]:
    """1 - mean cosine over the pairs of images inside each group (a prompt), groups in the order they first appear.

    0: all images of a prompt are the same; 1: they have nothing in common; at most 1 + 1 / (images - 1). Gradient flows
    to the features. Raises ValueError when a group has a single image: it has no pair.
    """
    if len(groups) != len(features):
        raise ValueError(f"{len(features)} features but {len(groups)} groups; expected one group per feature")
    rows: dict[Hashable, list[int]] = {}
    for row, group in enumerate(groups):
        rows.setdefault(group, []).append(row)
    if alone := [group for group, members in rows.items() if len(members) == 1]:
        raise ValueError(f"group {alone[0]!r} has one image; expected at least two, for diversity is between images")
    units = F.normalize(features, dim=-1)
    # The squared sum of n unit vectors is n plus twice the sum of the cosines of all pairs.
    cosines = [
        (units[members].sum(0).square().sum() - len(members)) / (len(members) * (len(members) - 1))
        for members in rows.values()
    ]
    return 1 - torch.stack(cosines)


def identity(features: Float[Tensor, "b d"], references: Float[Tensor, "b d"]) -> Float[Tensor, " b"]:
    """Cosine of matched pairs, -1 to 1: with DINO's ViT-S/16 and photographs of a subject as references, the subject
    fidelity of DreamBooth (Ruiz et al. 2023)."""
    if features.shape != references.shape:
        raise ValueError(f"features have shape {tuple(features.shape)}, references {tuple(references.shape)}")
    return F.cosine_similarity(features, references, dim=-1)
