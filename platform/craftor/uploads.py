"""Files from strangers -> pictures, or a refusal that says why: the only place where bytes from outside are decoded.

Nothing is unpacked before the header has said that it may be: format, size in pixels, one frame. What a camera or an
editor meant is honoured: rotation by EXIF, CMYK inks, transparency. Nothing is written anywhere.
"""

import io
import struct
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor


class UploadRefused(ValueError):
    """A file that is not decoded; the message names it, what is wrong and what is allowed."""


@dataclass(frozen=True)
class Limits:
    max_bytes: int = 10 << 20
    max_pixels: int = 4096 * 4096
    formats: tuple[str, ...] = ("PNG", "JPEG", "WEBP")
    """Pillow's names of them."""


@dataclass(frozen=True, eq=False)
class Picture:
    image: Float[Tensor, "3 H W"]
    """In [0, 1]."""
    alpha: Float[Tensor, "1 H W"] | None
    """Opacity in [0, 1], where the file has any transparency."""


_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
"""Eight bits a channel or fewer: conversion from others would clip."""


def picture(data: bytes, limits: Limits = Limits(), what: str = "image") -> Picture:  # noqa: B008  # it is frozen
    """Decode an uploaded picture. Raises UploadRefused."""
    opened = _open(data, limits, what)
    transparent = opened.mode in ("LA", "PA", "RGBA") or "transparency" in opened.info
    alpha = None
    if transparent:
        opened = opened.convert("RGBA")
        alpha = _tensor(opened.getchannel("A"))
    return Picture(_tensor(opened.convert("RGB")), alpha)


def mask(data: bytes, limits: Limits = Limits(), what: str = "mask") -> Float[Tensor, "1 H W"]:  # noqa: B008
    """Decode an uploaded mask: opacity where the file has any transparency, else brightness. Raises UploadRefused."""
    found = picture(data, limits, what)
    if found.alpha is not None:
        return found.alpha
    return found.image.mean(0, keepdim=True)


def _open(data: bytes, limits: Limits, what: str) -> Image.Image:
    """The one frame of a file, unpacked and upright."""
    if len(data) > limits.max_bytes:
        raise UploadRefused(f"{what}: {len(data)} bytes; allowed: at most {limits.max_bytes}")
    allowed = ", ".join(limits.formats)
    try:
        with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
            opened = Image.open(io.BytesIO(data), formats=limits.formats)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise UploadRefused(f"{what}: far more pixels than the {limits.max_pixels} allowed") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, TypeError) as error:
        raise UploadRefused(f"{what}: not a picture of an allowed format ({allowed}); {type(error).__name__}") from None
    width, height = opened.size  # from the header: no pixel is unpacked yet
    if width * height > limits.max_pixels:
        raise UploadRefused(f"{what}: {width}x{height} pixels; allowed: at most {limits.max_pixels} in all")
    if (frames := getattr(opened, "n_frames", 1)) > 1:
        raise UploadRefused(f"{what}: {frames} frames; allowed: a picture that does not move")
    if opened.mode not in _MODES:
        raise UploadRefused(f"{what}: pixels of kind {opened.mode}; allowed: 8 bits a channel")
    try:
        opened.load()
        return ImageOps.exif_transpose(opened)
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise UploadRefused(f"{what}: broken or cut short ({type(error).__name__})") from None


def _tensor(image: Image.Image) -> Float[Tensor, "c H W"]:
    pixels = np.asarray(image, dtype=np.float32) / 255
    return torch.from_numpy(pixels.reshape(image.height, image.width, -1)).movedim(-1, 0).contiguous()
