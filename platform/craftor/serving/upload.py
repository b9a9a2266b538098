"""A picture in a request -> where its denoising begins: image-to-image, and inpainting under a mask.

The picture's latents are noised to the level of the first step taken, and `strength` is the share of the steps that
are: SDEdit (Meng et al. 2022). Under a mask, what is to stay is put back at its level after every step, so that only
the rest is drawn anew, around it (Lugmayr et al. 2022, without resampling). Both as diffusers' pipelines do it.
"""

import hashlib
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from craftor import uploads
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
    """Of the uploaded picture's file."""
    mask_sha256: str | None = None

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

    def begin(self, step: Step, strength: float) -> Float[Tensor, "c h w"]:
        """Where denoising begins: under a mask the whole way is taken from noise alone, to leave no trace there."""
        return self.noise if self.mask is not None and strength == 1 else self.at(step)

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


def read(
    image: bytes,
    mask: bytes | None,
    strength: float,
    size: tuple[int, int],
    names: tuple[str, str] = ("image", "mask"),
) -> Upload:
    """Files of just this height and width. Raises UploadRefused naming that of `names` which is at fault."""
    picture, digest = read_picture(image, names[0], size)
    if mask is None:
        return Upload(picture, None, strength, digest)
    where, hole = read_picture(mask, names[1], size)
    return Upload(picture, (where.mean(0, keepdim=True) > 0.5).float(), strength, digest, hole)


def read_picture(file: bytes, param: str, size: tuple[int, int]) -> tuple[Float[Tensor, "3 H W"], str]:
    """Its pixels in [0, 1], and the file's sha256. Raises UploadRefused naming `param`."""
    height, width = size
    found = uploads.picture(file, uploads.Limits(size=(width, height)), param)
    return found.image, hashlib.sha256(file).hexdigest()
