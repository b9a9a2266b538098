"""An evaluation's folder: `evaluation.json` says of what it is, `parts/` holds every image's scores as Parquet.

A part is some prompts with all their images, written under a temporary name and renamed: it is whole or not there, so
an evaluation that was interrupted goes on with the parts it lacks, and no image is made or counted twice. Pictures are
rows too, for the first so many prompts.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from craftor.run_files import write_json

ABOUT, PARTS = "evaluation.json", "parts"
BLOCK, BATCH = 100, 12
"""Prompts are made in twelves, beginning anew with each hundred. Sums of floating-point numbers differ in their last
bit with the size of a batch, and rounding to 8 bits can bring that to light: so the batches are the same whoever makes
them, and as they were when the README's figures were made."""
STRIP_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of the tuned encoder in the variants `base`, `w0.25`, `w0.5`, `w0.75` and `tuned`."""
BOOKKEEPING = ("number", "prompt", "seed", "variant", "categories", "feature", "png", "image")
"""What an image has besides its scores."""
_TYPES = {
    "number": pyarrow.int64(),
    "prompt": pyarrow.string(),
    "seed": pyarrow.int64(),
    "variant": pyarrow.string(),
    "categories": pyarrow.list_(pyarrow.string()),
    "feature": pyarrow.list_(pyarrow.float32()),
    "png": pyarrow.binary(),
}
_MEANING = {
    "base_sha256": "images from another base",
    "variants": "images from other encoders",
    "prompts.sha256": "images of other prompts",
    "seed": "images from other noise",
    "num_seeds": "another number of images a prompt",
    "rollout": "another rollout",
}


class EvaluationError(ValueError):
    """An evaluation that cannot go on where it is, or cannot be compared."""


@dataclass(frozen=True)
class Evaluated:
    """A finished evaluation."""

    folder: Path
    about: dict[str, Any]
    images: list[dict[str, Any]]
    """One record an image, by prompt, seed and variant: its bookkeeping, its scores (None: it has none), `png`."""

    @property
    def metrics(self) -> list[str]:
        """Names of the scores."""
        return [key for key in self.images[0] if key not in BOOKKEEPING]


def begin(folder: Path, about: dict[str, Any]) -> None:
    """Start an evaluation in an empty folder or go on with the same one. Raises EvaluationError saying what differs."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / ABOUT).exists():
        refuse_difference(json.loads((folder / ABOUT).read_text()), about, f"{folder} holds", "; choose another --out")
    (folder / PARTS).mkdir(exist_ok=True)
    write_json(folder / ABOUT, about)


def refuse_difference(there: dict[str, Any], here: dict[str, Any], subject: str, advice: str = "") -> None:
    """Raises EvaluationError unless two evaluations are of the same thing; what matters most is named first."""
    for key in (*_MEANING, *there, *here):
        old, new = _at(there, key), _at(here, key)
        if old != new:
            raise EvaluationError(
                f"{subject} {_MEANING.get(key, f'an evaluation with another {key}')}: "
                f"{_short(old)} there, {_short(new)} here{advice}"
            )


def parts(num_prompts: int) -> list[range]:
    """Which prompts are in each part; a part is one batch."""
    blocks = [range(start, min(start + BLOCK, num_prompts)) for start in range(0, num_prompts, BLOCK)]
    return [block[start : start + BATCH] for block in blocks for start in range(0, len(block), BATCH)]


def missing(folder: Path, num_parts: int) -> list[int]:
    """Numbers of the parts that are not there yet."""
    return [part for part in range(num_parts) if not _path(folder, part).exists()]


def pack(images: Sequence[dict[str, Any]]) -> bytes:
    """A part's images as a Parquet file; they have the same keys, which but for the known ones are scores."""
    schema = pyarrow.schema([(key, _TYPES.get(key, pyarrow.float64())) for key in images[0]])
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(images), schema), sink)
    return sink.getvalue().to_pybytes()


def write_part(folder: Path, part: int, packed: bytes) -> None:
    path = _path(folder, part)
    temporary = path.with_name(f".writing-{path.name}")
    temporary.write_bytes(packed)
    temporary.rename(path)


def read(folder: Path) -> Evaluated:
    """All of a finished evaluation, in order. Raises EvaluationError where there is none, or one that lacks parts."""
    if not (folder / ABOUT).is_file():
        raise EvaluationError(f"{folder}: no evaluation there (no {ABOUT}); make one by: craftor evaluate RUN")
    about = json.loads((folder / ABOUT).read_text())
    num_parts = len(parts(about["prompts"]["num"]))
    if lacking := missing(folder, num_parts):
        raise EvaluationError(
            f"{folder}: unfinished, {len(lacking)} of {num_parts} parts are missing; go on by: craftor evaluate"
        )
    images = [row for part in range(num_parts) for row in _rows(_path(folder, part))]
    images.sort(key=lambda image: (image["number"], image["seed"], image["variant"]))
    each = [(image["number"], image["seed"]) for image in images if image["variant"] == "base"]
    if each != [(number, seed) for number in range(about["prompts"]["num"]) for seed in range(about["num_seeds"])]:
        raise EvaluationError(f"{folder}: its parts are not those of {ABOUT}: {len(each)} images of the base in them")
    return Evaluated(folder, about, images)


def _rows(path: Path) -> list[dict[str, Any]]:
    return pyarrow.parquet.read_table(path).to_pylist()


def _path(folder: Path, part: int) -> Path:
    return folder / PARTS / f"part-{part:06d}.parquet"


def _at(about: dict[str, Any], dotted: str) -> Any:
    for key in dotted.split("."):
        about = about.get(key, {})
    return about


def _short(value: Any) -> str:
    said = str(value)
    return said if len(said) <= 60 else f"{said[:57]}…"
