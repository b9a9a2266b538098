"""Uploaded pictures of an object -> what its image encoder takes; of the files nothing but their hashes is left."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest

import torch
from jaxtyping import Float
from torch import Tensor

from craftor.customize_files import read_reference, read_region
from craftor.serving.errors import ApiError, invalid
from craftor.serving.form import Form
from craftor.serving.metrics import Metrics
from craftor.serving.objects import ObjectEncoder, Reference
from craftor.serving.settings import Limits
from craftor.uploads import Limits as PictureLimits
from craftor.uploads import UploadRefused


@dataclass(frozen=True, eq=False)
class Sent:
    """The pictures of a form, as this version of an encoder takes them."""

    encoder: ObjectEncoder
    references: tuple[Reference, ...]
    regions: Float[Tensor, "n H W"] | None
    """Where each may be seen; None for everywhere."""
    files: Mapping[str, bytes]
    """What else the form has, by field: a picture to begin from and what steers it."""


def read(form: Form, encoder: ObjectEncoder, limits: Limits, metrics: Metrics, size: tuple[int, int]) -> Sent:
    """The form's pictures in order, the first cut out by its mask; regions are of the new pictures, of this size.

    Raises ApiError 400 naming the file at fault.
    """
    if (count := len(form.images)) > limits.references:
        raise invalid("image", f"{count} pictures of the object, allowed: up to {limits.references}")
    if (places := len(form.regions)) not in (0, count):
        raise invalid("region", f"{places} for {count} images, allowed: none, or one for each")
    try:
        sent = _read(form, encoder, PictureLimits(limits.edit_bytes, limits.picture_pixels), size)
    except UploadRefused as error:
        metrics.references.labels("refused").inc()
        raise ApiError(400, str(error), param=error.what, code="invalid_value") from None
    metrics.references.labels("read").inc(count)
    return sent


def _read(form: Form, encoder: ObjectEncoder, limits: PictureLimits, size: tuple[int, int]) -> Sent:
    references, regions = [], []
    for index, (image, region) in enumerate(zip_longest(form.images, form.regions)):
        numbered = "" if len(form.images) == 1 else f".{index}"
        mask = form.mask if index == 0 else None
        cut_out = read_reference(image, mask, limits, "image" + numbered)
        if region is not None:
            regions.append(read_region(region, size, "region" + numbered, limits))
        files = {"image": image, "mask": mask, "region": region}
        hashes = {name: hashlib.sha256(file).hexdigest() for name, file in files.items() if file is not None}
        references.append(Reference(encoder.images.pixels(cut_out)[0].clone(), hashes))
    return Sent(encoder, tuple(references), torch.stack(regions) if regions else None, form.others)
