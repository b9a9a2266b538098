"""A folder of folders -> pictures of objects, each with its identity, and the mask that lies beside it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MASK = ".mask"


@dataclass(frozen=True)
class Source:
    identity: str
    path: Path
    mask: Path | None

    @property
    def key(self) -> str:
        return f"{self.identity}/{self.path.name}"


def find(folder: Path) -> list[Source]:
    """In order of identity and name. Raises ValueError where there is none, and for masks without a picture."""
    found: list[Source] = []
    for identity in sorted(path for path in folder.iterdir() if path.is_dir()):
        files = sorted(path for path in identity.iterdir() if path.suffix.lower() in SUFFIXES)
        masks = {path.name.rsplit(MASK, 1)[0]: path for path in files if path.stem.endswith(MASK)}
        pictures = [path for path in files if path not in masks.values()]
        found += [Source(identity.name, path, masks.pop(path.stem, None)) for path in pictures]
        if masks:
            raise ValueError(f"{next(iter(masks.values()))}: a mask without a picture beside it")
    if not found:
        raise ValueError(f"{folder}: no pictures; expected IDENTITY/NAME.png (or {', '.join(SUFFIXES[1:])})")
    return found


def parts(sources: Sequence[Source], size: int) -> list[list[Source]]:
    """Groups of pictures, closed once they have `size` of them; all of one object are in one, where it is paired."""
    found: list[list[Source]] = []
    for _, same in groupby(sources, key=lambda source: source.identity):
        if not found or len(found[-1]) >= size:
            found.append([])
        found[-1] += same
    return found
