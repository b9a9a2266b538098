"""A picture in a request -> where its denoising begins: image-to-image, and inpainting under a mask.

The picture's latents are noised to the level of the first step taken, and `strength` is the share of the steps that
are: SDEdit (Meng et al. 2022). Under a mask, what is to stay is put back at its level after every step, so that only
the rest is drawn anew, around it (Lugmayr et al. 2022, without resampling).
"""

import base64
import binascii
import hashlib
import io
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from craftor.diffuser import Diffuser
from craftor.solver import Step, add_noise


@dataclass(frozen=True, eq=False)
class Upload:
    """A picture to begin from."""

    image: Float[Tensor, "3 H W"]
    mask: Float[Tensor, "1 H W"] | None
    """1 where to draw anew, 0 where to keep the picture."""
    strength: float
    """In (0, 1]: how much of the way from noise is taken."""
    sha256: str
    """Of the uploaded files."""

    def first_step(self, num_steps: int) -> int:
        """The first of `num_steps` denoising steps that is taken; diffusers' rule, and at least one."""
        return num_steps - max(1, min(int(num_steps * self.strength), num_steps))


@dataclass(frozen=True, eq=False)
class Kept:
    """What a row needs of its upload while it is on its way."""

    latents: Float[Tensor, "c h w"]
    noise: Float[Tensor, "c h w"]
    mask: Float[Tensor, "1 h w"] | None

    def at(self, step: Step | None) -> Float[Tensor, "c h w"]:
        """The picture at the noise level of a step, or clean after the last."""
        return self.latents if step is None else add_noise(step, self.latents, self.noise)

    def put_back(self, drawn: Float[Tensor, "c h w"], following: Step | None) -> Float[Tensor, "c h w"]:
        """The latents after a step, with what is to be kept of the picture in its place."""
        return drawn if self.mask is None else self.mask * drawn + (1 - self.mask) * self.at(following)


@torch.inference_mode()
def encode(base: Diffuser, upload: Upload, noise: Float[Tensor, "c h w"]) -> Kept:
    """An upload's latents: the mean of what the autoencoder makes of it, so that nothing is drawn at random."""
    found = base.vae.encode(2 * upload.image[None].to(base.device) - 1)
    latents = (
        found.latents if hasattr(found, "latents") else found.latent_dist.mode()
    ) * base.vae.config.scaling_factor
    mask = upload.mask
    if mask is not None:
        mask = torch.nn.functional.interpolate(mask[None], size=noise.shape[-2:])[0].to(base.device)
    return Kept(latents[0], noise, mask)


def read(image: str, mask: str | None, strength: float, size: tuple[int, int]) -> Upload:
    """Base64 files (with or without `data:` in front) of just this height and width. Raises ValueError."""
    files = [_bytes(image, "image"), *([_bytes(mask, "mask")] if mask is not None else [])]
    digest = hashlib.sha256(b"".join(hashlib.sha256(file).digest() for file in files)).hexdigest()
    picture = _pixels(files[0], "image", "RGB", size)
    hole = (_pixels(files[1], "mask", "L", size) > 0.5).float() if mask is not None else None
    return Upload(picture, hole, strength, digest)


def _bytes(text: str, what: str) -> bytes:
    try:
        return base64.b64decode(text.partition(",")[2] if text.startswith("data:") else text, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"{what}: not base64") from None


def _pixels(data: bytes, what: str, mode: str, size: tuple[int, int]) -> Float[Tensor, "c H W"]:
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as opened:
            found = opened.size  # known before any pixel is unpacked
            if found != size[::-1]:
                raise ValueError(
                    f"{what}: {found[0]}x{found[1]} pixels, allowed: {size[1]}x{size[0]}, the size asked for"
                )
            pixels = np.asarray(opened.convert(mode), dtype=np.float32) / 255
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{what}: not a PNG, JPEG or WebP file ({type(error).__name__})") from None
    return torch.from_numpy(pixels).reshape(*size, -1).movedim(-1, 0).contiguous()
