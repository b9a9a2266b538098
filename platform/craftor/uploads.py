"""Files from strangers -> pictures, or a refusal that says why: the only place where bytes from outside are decoded.

Nothing is unpacked before the header has said that it may be: format, size in pixels, one frame. What a camera or an
editor meant is honoured: rotation by EXIF, CMYK inks, transparency. Nothing is written anywhere.
"""

import io
import struct
import warnings
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor


class UploadRefused(ValueError):
    """A file that is not used; the message names it, what is wrong and what is allowed."""

    def __init__(self, what: str, message: str) -> None:
        super().__init__(f"{what}: {message}")
        self.what = what


@dataclass(frozen=True)
class Limits:
    max_bytes: int = 10 << 20
    max_pixels: int = 4096 * 4096
    formats: tuple[str, ...] = ("PNG", "JPEG", "WEBP")
    """Pillow's names of them."""
    size: tuple[int, int] | None = None
    """Width and height, where only one size will do."""


@dataclass(frozen=True, eq=False)
class Picture:
    image: Float[Tensor, "3 H W"]
    """In [0, 1]."""
    alpha: Float[Tensor, "1 H W"] | None
    """Opacity in [0, 1], where anything in the picture is transparent."""


_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
"""Eight bits a channel or fewer: conversion from others would clip."""
_BROKEN = (
    UnidentifiedImageError,
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    OverflowError,
    struct.error,
    zlib.error,
)
"""What Pillow raises for files that are not as their format demands."""


def picture(data: bytes, limits: Limits = Limits(), what: str = "image") -> Picture:  # noqa: B008  # it is frozen
    """Decode an uploaded picture. Raises UploadRefused."""
    opened = _open(data, limits, what)
    transparent = opened.mode in ("LA", "PA", "RGBA") or "transparency" in opened.info
    alpha = None
    if transparent:
        opened = opened.convert("RGBA")
        opacity = _tensor(opened.getchannel("A"))
        alpha = opacity if opacity.amin() < 1 else None  # many programs write a channel that says nothing
    return Picture(_tensor(opened.convert("RGB")), alpha)


def mask(data: bytes, limits: Limits = Limits(), what: str = "mask") -> Float[Tensor, "1 H W"]:  # noqa: B008
    """Decode an uploaded mask: opacity where anything in it is transparent, else brightness. Raises UploadRefused."""
    found = picture(data, limits, what)
    if found.alpha is not None:
        return found.alpha
    return found.image.mean(0, keepdim=True)


def _open(data: bytes, limits: Limits, what: str) -> Image.Image:
    """The one frame of a file, unpacked and upright."""
    if len(data) > limits.max_bytes:
        raise UploadRefused(what, f"{len(data)} bytes; allowed: at most {limits.max_bytes}")
    allowed = ", ".join(limits.formats)
    try:
        with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
            opened = Image.open(io.BytesIO(data), formats=limits.formats)
        frames = getattr(opened, "n_frames", 1)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise UploadRefused(what, f"far more pixels than the {limits.max_pixels} allowed") from None
    except _BROKEN as error:
        raise UploadRefused(what, f"not a picture of an allowed format ({allowed}); {type(error).__name__}") from None
    _check_header(opened, limits, what)
    if frames > 1 and opened.format != "MPO":  # a camera's JPEG, with a second picture for other screens behind it
        raise UploadRefused(what, f"{frames} frames; allowed: a picture that does not move")
    try:
        opened.load()
        upright = ImageOps.exif_transpose(opened)
    except _BROKEN as error:
        raise UploadRefused(what, f"broken or cut short ({type(error).__name__})") from None
    if limits.size not in (None, upright.size):
        raise _other_size(upright, limits, what)
    return upright


def _check_header(opened: Image.Image, limits: Limits, what: str) -> None:
    """No pixel is unpacked yet."""
    width, height = opened.size
    if limits.size is not None and opened.size not in (limits.size, limits.size[::-1]):  # it may lie on its side
        raise _other_size(opened, limits, what)
    if width * height > limits.max_pixels:
        raise UploadRefused(what, f"{width}x{height} pixels; allowed: at most {limits.max_pixels} in all")
    if opened.mode not in _MODES:
        raise UploadRefused(what, f"pixels of kind {opened.mode}; allowed: 8 bits a channel")


def _other_size(found: Image.Image, limits: Limits, what: str) -> UploadRefused:
    assert limits.size is not None
    width, height = limits.size
    return UploadRefused(what, f"{found.width}x{found.height} pixels, allowed: {width}x{height}, the size asked for")


def _tensor(image: Image.Image) -> Float[Tensor, "c H W"]:
    pixels = np.asarray(image, dtype=np.float32) / 255
    return torch.from_numpy(pixels.reshape(image.height, image.width, -1)).movedim(-1, 0).contiguous()
