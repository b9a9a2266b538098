"""Images that were asked for as URLs: files of a folder that all replicas of a machine share, kept for a while."""

import os
import re
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from craftor.serving.errors import ApiError


@dataclass(frozen=True)
class Pictures:
    folder: Path
    seconds: float
    """After which a picture is removed."""

    def keep(self, data: bytes) -> str:
        """Its name, which cannot be guessed: who knows it may read it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sweep()
        name = f"{secrets.token_urlsafe(24)}.png"
        temporary = self.folder / f".{name}"
        temporary.write_bytes(data)
        os.replace(temporary, self.folder / name)
        return name

    def read(self, name: str) -> bytes:
        """Raises ApiError 404 for one that is not there, or not there any more."""
        with suppress(FileNotFoundError):
            if re.fullmatch(r"[A-Za-z0-9_-]{32}\.png", name):
                return (self.folder / name).read_bytes()
        raise ApiError(404, f"no image {name!r}; they are kept for {self.seconds:g} s", code="image_not_found")

    def _sweep(self) -> None:
        oldest = time.time() - self.seconds
        for path in self.folder.glob("*.png"):
            with suppress(FileNotFoundError):  # another request has given it its name, or has removed it
                if path.stat().st_mtime < oldest:
                    path.unlink()
