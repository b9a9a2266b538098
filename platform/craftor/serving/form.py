"""A form with files -> an edit's fields and the bytes of its pictures, which are in memory alone, for a while."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from craftor.serving.errors import ApiError, invalid
from craftor.serving.schema import Edit

TEXTS = ("prompt", "negative_prompt")
"""Fields that may be empty; of all others that means that they are not said."""
PART_OF_MIX = re.compile(r"mix\[([^\[\]]+)\](?:\[([^\[\]]+)\])?")
"""How OpenAI's client spells what is inside a dictionary."""
SEVERAL = ("image", "region")
ONCE = ("mask", "scene", "scene_mask", "control_image")
FILES = {name + end: name for name in SEVERAL for end in ("", "[]")} | {name: name for name in ONCE}
"""The field of each name."""
MOST_PARTS = 64


@dataclass(frozen=True)
class Form:
    body: Edit
    images: tuple[bytes, ...]
    mask: bytes | None
    regions: tuple[bytes, ...]
    others: dict[str, bytes]
    """`scene`, `scene_mask` and `control_image`, as far as sent."""


class _InMemory(MultiPartParser):
    spool_max_size = 0  # without end: nothing that is uploaded comes to lie on a disk


async def read(request: Request) -> Form:
    """Raises ApiError or RequestValidationError for what is no such form, naming the field."""
    kind = request.headers.get("content-type", "nothing")
    if not kind.lower().startswith("multipart/form-data"):
        raise ApiError(400, f"Content-Type: {kind}, allowed: multipart/form-data", code="invalid_form")
    parser = _InMemory(request.headers, request.stream(), max_files=MOST_PARTS, max_fields=MOST_PARTS)
    try:
        form = await parser.parse()
    except (MultiPartException, UnicodeError) as error:  # a charset may be one that no text is in
        raise ApiError(400, f"the body is not a valid form: {error}", code="invalid_form") from None
    except ClientDisconnect:
        raise ApiError(499, "the client hung up", code="cancelled") from None
    try:
        files = await _files(form)
        body = _edit(_fields(form))
    finally:
        await form.close()
    if not files["image"]:
        raise ApiError(400, "missing parameter: image", param="image", code="missing_parameter")
    for name in ONCE:
        if len(files[name]) > 1:
            raise invalid(name, f"{len(files[name])} files, allowed: one")
    once = {name: files[name][0] for name in ONCE if files[name]}
    return Form(body, tuple(files["image"]), once.pop("mask", None), tuple(files["region"]), once)


async def _files(form: FormData) -> dict[str, list[bytes]]:
    found: dict[str, list[bytes]] = {name: [] for name in FILES.values()}
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            if name not in FILES:
                raise invalid(name, "a file, allowed: text" if name in Edit.model_fields else "not supported here")
            found[FILES[name]].append(await value.read())
        elif name in FILES and value:
            raise invalid(FILES[name], "text, allowed: a file")
    return found


def _fields(form: FormData) -> dict[str, Any]:
    """Texts by the name of their field; `mix` and `sweep` as what their JSON says, or the former in brackets."""
    fields: dict[str, Any] = {}
    mix: dict[str, Any] = {}
    for name, value in form.multi_items():
        if not isinstance(value, str) or name in FILES or (value == "" and name not in TEXTS):
            continue
        if part := PART_OF_MIX.fullmatch(name):
            encoder, key = part.groups()
            if key is None:
                mix[encoder] = value
            elif isinstance(inside := mix.setdefault(encoder, {}), dict):
                inside[key] = value
        elif name in fields:
            raise invalid(name, "given twice")
        else:
            fields[name] = _json(name, value) if name in ("mix", "sweep") else value
    if mix and "mix" in fields:
        raise invalid("mix", "given twice, as JSON and in brackets")
    return fields | ({"mix": mix} if mix else {})


def _json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"{name}: not valid JSON: {error}", param=name, code="invalid_json") from None


def _edit(fields: Mapping[str, Any]) -> Edit:
    """All of a form is text, so numbers may be spelled."""
    try:
        return Edit.model_validate(fields, strict=False)
    except ValidationError as error:
        found = error.errors(include_context=False)
        raise RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in found]) from None


def document() -> dict[str, Any]:
    """The request's body for OpenAPI, which FastAPI cannot tell from a form that we read ourselves."""
    schema = Edit.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)  # the document has them already
    file = {"type": "string", "format": "binary"}
    schema["properties"] = {
        "image": {
            "type": "array",
            "items": file,
            "minItems": 1,
            "description": "Pictures of one object (PNG, JPEG or WebP); what is transparent is not part of it.",
        },
        "mask": {
            **file,
            "description": "Where the object is in the first of them: opaque, or white where nothing is transparent; "
            "of the same size. It takes the place of that picture's own transparency.",
        },
        "region": {
            "type": "array",
            "items": file,
            "description": "For each `image`, in order, where in the new picture it may be seen: white there, of any "
            "size. With regions, the images may be of several objects.",
        },
        "scene": {
            **file,
            "description": "A picture to begin from, of the size asked for: the object comes into it by `strength`.",
        },
        "scene_mask": {**file, "description": "Where to draw anew (white) and where to keep the scene (black)."},
        "control_image": {**file, "description": "What the server's ControlNet reads, where it has one."},
        **schema["properties"],
    }
    schema["required"] = ["image", *schema["required"]]
    pictures = {"contentType": "image/png, image/jpeg, image/webp"}
    spelled = {"contentType": "application/json"}
    encoding = dict.fromkeys((*SEVERAL, *ONCE), pictures) | {"mix": spelled, "sweep": spelled}
    return {
        "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema, "encoding": encoding}}}
    }
