"""Files of objects, their masks and regions -> what a customizer reads, and a sheet of what it draws."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from craftor import object_condition, seeds, uploads
from craftor.customize import Guidance, load, mixed
from craftor.pictures import save_sheet
from craftor.recipe import RecipeError
from craftor.uploads import UploadRefused

_PLACE_SIDE = 64
"""Pixels of a region's side: attention reads it at its own, smaller sizes."""


@dataclass(frozen=True)
class Shown:
    """A picture of an object, where in it the object is, and where in the new picture it may be seen."""

    image: Path
    mask: Path | None = None
    region: Path | None = None

    def reference(self) -> Float[Tensor, "1 3 H W"]:
        """The object, cut out. Raises RecipeError naming the file that cannot be used."""
        try:
            return read_reference(self.image.read_bytes(), self.mask.read_bytes() if self.mask else None)
        except UploadRefused as error:
            raise RecipeError(f"{self.mask if error.what == 'mask' else self.image}: {error}") from None

    def place(self, side: int) -> Float[Tensor, "side side"]:
        """1 where the object may be, 0 elsewhere; all of the picture where no region was given."""
        if self.region is None:
            return torch.ones(side, side)
        try:
            return read_region(self.region.read_bytes(), (side, side), "region")
        except UploadRefused as error:
            raise RecipeError(f"{self.region}: {error}") from None


def customize_file(
    shown: Sequence[Shown],
    prompt: str,
    encoder: str,
    out: Path,
    num: int,
    seed: int,
    guidance: Guidance,
    mixture: Mapping[str, float] | None = None,
) -> Path:
    """The pictures of `craftor customize`, on one sheet. Raises RecipeError for files that cannot be used."""
    references = [one.reference().expand(num, -1, -1, -1) for one in shown]
    places = [one.place(_PLACE_SIDE) for one in shown]
    customizer = mixed(load(encoder), mixture or {})
    noise = seeds.normal(seed, range(num), "customize", customizer.diffuser.latent_shape)
    regions = torch.stack(places) if any(one.region for one in shown) else None
    save_sheet(customizer.generate([prompt] * num, references, noise, guidance, regions).clamp(0, 1), out)
    return out


def read_reference(
    image: bytes,
    mask: bytes | None,
    limits: uploads.Limits = uploads.Limits(),  # noqa: B008  # it is frozen
    what: str = "image",
) -> Float[Tensor, "1 3 H W"]:
    """An uploaded picture, cut out by its mask or by its own transparency; whole where it has neither.

    Raises UploadRefused for files that cannot be used, a mask of another size, and one without an object in it.
    """
    picture = uploads.picture(image, limits, what)
    where = picture.alpha if mask is None else uploads.mask(mask, limits)
    if where is None:
        return picture.image[None]
    (height, width), found = picture.image.shape[1:], where.shape[1:]
    if found != (height, width):
        sizes = f"{found[1]}x{found[0]} pixels, {what} has {width}x{height}"
        raise UploadRefused("mask", f"{sizes}; allowed: the same size")
    if where.amax() == 0:
        nothing = "transparent everywhere" if mask is None else "empty, black or transparent everywhere"
        raise UploadRefused(
            what if mask is None else "mask", f"{nothing}: there is no object in {width}x{height} pixels"
        )
    return object_condition.cut_out(picture.image[None], where[None])


def read_region(
    file: bytes,
    size: tuple[int, int],
    what: str,
    limits: uploads.Limits = uploads.Limits(),  # noqa: B008  # it is frozen
) -> Float[Tensor, "H W"]:
    """A picture of any size, white where an object may be seen -> 1 there and 0 elsewhere, at this height and width.

    Raises UploadRefused for a file that cannot be used, and for one that is black everywhere.
    """
    found = uploads.mask(file, limits, what)
    place = (F.interpolate(found[None], size, mode="area")[0, 0] > 0.5).float()
    if not place.any():
        raise UploadRefused(what, "black everywhere, so the object may be nowhere; white is where it may be")
    return place
