"""Pictures that a request begins from or is steered by: base64 in JSON, files in a form -> what they do."""

import base64
import binascii
from collections.abc import Mapping

from craftor.serving.control import Control
from craftor.serving.errors import ApiError, invalid
from craftor.serving.schema import Asked, Generation
from craftor.serving.upload import Upload, read, read_picture
from craftor.uploads import UploadRefused

Files = Mapping[str, bytes]
"""By field."""


def decoded(body: Generation) -> Files:
    """A body's files, with or without `data:` in front. Raises ApiError naming the field that is not base64."""
    found = {}
    for name in ("image", "mask", "control_image"):
        if (text := getattr(body, name)) is not None:
            try:
                found[name] = base64.b64decode(
                    text.partition(",")[2] if text.startswith("data:") else text, validate=True
                )
            except (binascii.Error, ValueError):
                raise invalid(name, "not base64") from None
    return found


def upload(body: Asked, files: Files, size: tuple[int, int]) -> Upload | None:
    """The picture to begin from, of just this height and width. Raises ApiError."""
    image, mask = ("image", "mask") if isinstance(body, Generation) else ("scene", "scene_mask")
    if image not in files:
        for name, value in ((mask, files.get(mask)), ("strength", body.strength)):
            if value is not None:
                raise invalid(name, f"goes with {image}")
        return None
    try:
        return read(files[image], files.get(mask), body.strength or 0.8, size, (image, mask))
    except UploadRefused as error:
        raise ApiError(400, str(error), param=error.what, code="invalid_value") from None


def control(body: Asked, files: Files, size: tuple[int, int], *, served: bool) -> Control | None:
    """What steers it, where a ControlNet is `served`. Raises ApiError."""
    if "control_image" not in files:
        if body.control_scale is not None:
            raise invalid("control_scale", "goes with control_image")
        return None
    if not served:
        message = "control_image: this server has no ControlNet"
        raise ApiError(400, message, param="control_image", code="unknown_parameter")
    try:
        picture, digest = read_picture(files["control_image"], "control_image", size)
    except UploadRefused as error:
        raise ApiError(400, str(error), param=error.what, code="invalid_value") from None
    return Control(picture, 1.0 if body.control_scale is None else body.control_scale, digest)
