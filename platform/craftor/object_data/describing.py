"""Pictures of objects -> Parquet with a caption and a mask for each: a pool of Ray Data actors, resumable.

A part of some pictures is one file, named by what it is made of: the pictures' bytes, the settings. It appears whole or
not at all; what is there when a run starts is not made again. Pictures that cannot be used are left out and told.
"""

import hashlib
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import ray.data
import torch
from PIL import Image
from torch import Tensor

from craftor import uploads
from craftor.object_data import captioners
from craftor.object_data.captioners import AttributeReader, merge
from craftor.object_data.masks import Segmenter
from craftor.object_data.settings import ObjectData
from craftor.object_data.sources import Source, find, parts

FROM_FILE, FROM_ALPHA, FOUND = "file", "transparency", "found"
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("identity", pa.string()),
        ("caption", pa.string()),
        ("image", pa.binary()),
        ("mask", pa.binary()),
        ("mask_from", pa.string()),
    ]
)
"""`image` is the file as it was, `mask` an 8-bit PNG of the picture's size."""


@dataclass(frozen=True)
class Described:
    num_pictures: int
    num_made: int
    """The others were there from before."""
    left_out: list[dict[str, str]]
    """`key` and `reason` of each picture that could not be used."""


class Describe:
    """A part -> its file. Models are loaded once an actor."""

    def __init__(self, settings: dict[str, Any], out: str) -> None:
        torch.set_num_threads(1)
        self.settings, self.out = ObjectData.model_validate(settings), Path(out)
        self.caption = captioners.build(self.settings.captioner)
        self.attributes = AttributeReader(self.settings.attributes) if self.settings.attributes else None
        self.segment = Segmenter(self.settings.masks) if self.settings.masks else None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        kept: list[tuple[Source, bytes, Tensor, Tensor, str]] = []
        left_out: list[dict[str, str]] = []
        for source in (Source(i, Path(p), Path(m) if m else None) for i, p, m in json.loads(row["sources"])):
            try:
                kept.append((source, *self._read(source)))
            except ValueError as error:
                left_out.append({"key": source.key, "reason": str(error)})
        images = [image for _, _, image, _, _ in kept]
        said = self._captions(images) if images else []
        columns = {
            "key": [source.key for source, *_ in kept],
            "identity": [source.identity for source, *_ in kept],
            "caption": said,
            "image": [data for _, data, *_ in kept],
            "mask": [_png(mask) for *_, mask, _ in kept],
            "mask_from": [origin for *_, origin in kept],
        }
        metadata = {b"left_out": json.dumps(left_out).encode()}
        # Whole or not at all: another run may look at the folder, this one may be killed.
        path = self.out / str(row["name"])
        pyarrow.parquet.write_table(
            pa.table(columns, schema=SCHEMA).replace_schema_metadata(metadata), unfinished := path.with_suffix(".part")
        )
        os.replace(unfinished, path)
        return {"name": str(row["name"]), "num": len(kept)}

    def _captions(self, images: list[Tensor]) -> list[str]:
        captions = self.caption(images)
        attributes = self.attributes(images) if self.attributes else [[] for _ in images]
        return [merge(c, a, self.settings.kind) for c, a in zip(captions, attributes, strict=True)]

    def _read(self, source: Source) -> tuple[bytes, Tensor, Tensor, str]:
        """A picture's bytes, pixels and mask, and where the mask is from. Raises ValueError for one of no use."""
        data = source.path.read_bytes()
        picture = uploads.picture(data)
        if source.mask is not None:
            mask, origin = uploads.mask(source.mask.read_bytes()), FROM_FILE
        elif picture.alpha is not None:
            mask, origin = picture.alpha, FROM_ALPHA
        elif self.segment is not None:
            mask, origin = self.segment([picture.image])[0], FOUND
        else:
            raise ValueError(f"no mask; expected {source.path.stem}.mask.png, transparency, or [masks] in the settings")
        if mask.shape[1:] != picture.image.shape[1:]:
            size, own = (f"{t.shape[2]}x{t.shape[1]}" for t in (mask, picture.image))
            raise ValueError(f"its mask has {size} pixels, the picture {own}")
        if not (mask > 0.5).any():
            asked = (
                f" ({self.settings.masks.prompt!r} was looked for)" if origin == FOUND and self.settings.masks else ""
            )
            raise ValueError(f"the mask is empty: there is no object in it{asked}")
        return data, picture.image, mask, origin


def describe(settings: ObjectData, out: Path, num_actors: int = 1) -> Described:
    """Describe what `out` lacks; needs a running Ray. Raises ValueError where there is no picture, or none of use."""
    sources = find(Path(settings.images))
    out.mkdir(parents=True, exist_ok=True)
    wanted = {_name(part, settings): part for part in parts(sources, settings.pictures_per_part)}
    for path in files(out):
        if path.name not in wanted:
            path.unlink()  # of pictures or settings that have changed since
    missing = {name: part for name, part in wanted.items() if not (out / name).exists()}
    if missing:
        rows = [
            {"name": name, "sources": json.dumps([_plain(source) for source in part])} for name, part in missing.items()
        ]
        ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            Describe,
            fn_constructor_args=(settings.model_dump(), str(out.resolve())),
            compute=ray.data.ActorPoolStrategy(size=min(num_actors, len(rows))),
        ).materialize()
    left_out = [row for name in wanted for row in _left_out(out / name)]
    if len(left_out) == len(sources):
        raise ValueError(f"{settings.images}: no picture is of use; {left_out[0]['key']}: {left_out[0]['reason']}")
    num_made = sum(len(part) for part in missing.values())
    return Described(len(sources) - len(left_out), num_made, left_out)


def files(out: Path) -> list[Path]:
    """The parts; no identity is in two of them."""
    return sorted(out.glob("described-*.parquet"))


def _name(part: list[Source], settings: ObjectData) -> str:
    digest = hashlib.sha256(settings.model_dump_json().encode())
    for source in part:
        digest.update(source.key.encode() + b"\0")
        for path in filter(None, (source.path, source.mask)):
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return f"described-{digest.hexdigest()[:24]}.parquet"


def _plain(source: Source) -> list[str]:
    return [source.identity, str(source.path.resolve()), str(source.mask.resolve()) if source.mask else ""]


def _left_out(path: Path) -> list[dict[str, str]]:
    metadata = pyarrow.parquet.read_schema(path).metadata or {}
    return json.loads(metadata.get(b"left_out", b"[]"))


def _png(mask: Tensor) -> bytes:
    file = io.BytesIO()
    Image.fromarray((mask[0].numpy() * 255).round().astype(np.uint8)).save(file, "PNG")
    return file.getvalue()
