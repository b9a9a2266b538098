"""Uploaded pictures of an object -> what its image encoder takes; of the files nothing but their hashes is left."""

import hashlib

from craftor.customize_files import read_reference
from craftor.serving.errors import ApiError
from craftor.serving.form import Form
from craftor.serving.metrics import Metrics
from craftor.serving.objects import ObjectEncoder, Reference
from craftor.serving.settings import Limits
from craftor.uploads import Limits as PictureLimits
from craftor.uploads import UploadRefused


def read(form: Form, encoder: ObjectEncoder, limits: Limits, metrics: Metrics) -> tuple[Reference, ...]:
    """The form's pictures in order, the first cut out by its mask. Raises ApiError 400 naming the file at fault."""
    if (count := len(form.images)) > limits.references:
        message = f"image: {count} pictures of the object, allowed: up to {limits.references}"
        raise ApiError(400, message, param="image", code="invalid_value")
    allowed = PictureLimits(limits.edit_bytes, limits.picture_pixels)
    references = []
    for index, image in enumerate(form.images):
        what = "image" if count == 1 else f"image.{index}"
        mask = form.mask if index == 0 else None
        try:
            pixels = encoder.images.pixels(read_reference(image, mask, allowed, what))[0].clone()
        except UploadRefused as error:
            metrics.references.labels("refused").inc()
            raise ApiError(400, str(error), param=error.what, code="invalid_value") from None
        metrics.references.labels("read").inc()
        masked = None if mask is None else hashlib.sha256(mask).hexdigest()
        references.append(Reference(pixels, hashlib.sha256(image).hexdigest(), masked))
    return tuple(references)
