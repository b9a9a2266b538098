"""Images in [0, 1] of any size -> what a reward's tower was trained on, in torch, with gradient to every pixel it sees.

A reference implementation resizes 8-bit images with PIL. Here the same filter (bicubic, a = -1/2, widened when it
shrinks) runs on floating-point images; what is left between the two is PIL's rounding to 8 bits, once per axis.
"""

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Fit = Literal["crop", "crop_torchvision", "letterbox", "pad_mean"]
Resize = Literal["bicubic", "average_pool"]
Clamp = Literal["none", "straight_through", "hard"]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def preprocess(
    images: Float[Tensor, "b 3 H W"],
    size: int,
    *,
    fit: Fit = "crop",
    resize: Resize = "bicubic",
    clamp: Clamp = "straight_through",
    mean: tuple[float, float, float] = CLIP_MEAN,
    std: tuple[float, float, float] = CLIP_STD,
) -> Float[Tensor, "b 3 size size"]:
    """Images in [0, 1] made square, `size` pixels wide, and normalised as `(x - mean) / std`; float32.

    fit: how an image that is not square becomes so.
        "crop": the shorter side becomes `size`, the middle of the longer one is kept; as transformers' processors.
        "crop_torchvision": the same, but half a pixel of margin is rounded to even as torchvision does, not down.
        "letterbox": the longer side becomes `size`, black bars fill the rest (HPSv2).
        "pad_mean": bars of the mean colour, then a resize; what is normalised is 0 there (LLaVA, VQAScore).
    resize: "bicubic" with antialiasing; "average_pool" is adaptive average pooling, which TextCraftor scored with:
        for its figures only.
    clamp: the filter overshoots [0, 1] beside edges, and PIL cuts that off after each axis. "hard" does too, and has no
        gradient there; "straight_through" has its value and the gradient as if nothing was cut; "none" leaves it,
        which is right where the reference resizes tensors (HPSv2). Images of the right size are not changed by any.

    Raises ValueError for an unknown `fit`, `resize` or `clamp`.
    """
    if fit not in ("crop", "crop_torchvision", "letterbox", "pad_mean"):
        raise ValueError(f"unknown fit '{fit}'; available: crop, crop_torchvision, letterbox, pad_mean")
    images = images.float()
    centre, spread = (images.new_tensor(values)[:, None, None] for values in (mean, std))
    height, width = images.shape[2:]
    if fit == "pad_mean":
        images = _pad(images - centre, max(height, width)) + centre
        height, width = images.shape[2:]
    if fit == "letterbox":
        shape = [round(side * (size / max(height, width))) for side in (height, width)]
    else:  # the longer side is rounded down, as every reference does
        shape = [size if side == min(height, width) else size * side // min(height, width) for side in (height, width)]
    images = _resize(images, (shape[0], shape[1]), resize, clamp)
    if fit == "letterbox":
        images = _pad(images, size)
    else:
        top, left = ((side - size) // 2 if fit == "crop" else round((side - size) / 2) for side in shape)
        images = images[:, :, top : top + size, left : left + size]
    return (images - centre) / spread


def _resize(images: Float[Tensor, "b 3 H W"], shape: tuple[int, int], resize: Resize, clamp: Clamp) -> Tensor:
    """PIL's order: the horizontal axis, then the vertical one, each clamped."""
    if resize == "average_pool":
        return _clamp(F.adaptive_avg_pool2d(images, shape), clamp)
    if resize != "bicubic":
        raise ValueError(f"unknown resize '{resize}'; available: bicubic, average_pool")
    # Without a clamp between them one call does both axes.
    steps = [shape] if clamp == "none" else [(images.shape[2], shape[1]), shape]
    for step in steps:
        if images.shape[2:] != step:
            images = F.interpolate(images, size=step, mode="bicubic", antialias=True, align_corners=False)
        images = _clamp(images, clamp)
    return images


def _clamp(images: Tensor, clamp: Clamp) -> Tensor:
    if clamp == "none":
        return images
    if clamp == "hard":
        return images.clamp(0, 1)
    if clamp == "straight_through":
        return images + (images.clamp(0, 1) - images).detach()
    raise ValueError(f"unknown clamp '{clamp}'; available: none, straight_through, hard")


def _pad(images: Float[Tensor, "b 3 H W"], side: int) -> Float[Tensor, "b 3 side side"]:
    """Zeros around the image; an odd row or column more goes below and to the right."""
    height, width = side - images.shape[2], side - images.shape[3]
    return F.pad(images, (width // 2, width - width // 2, height // 2, height - height // 2))
