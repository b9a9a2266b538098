"""The encoders that are served, by name: loaded and checked first, then swapped in, while requests go on.

A name stands for a source: a bundle's folder, or a reference into the registry whose alias may move. `refresh` looks
the references up again, and for encoders that are new in the registry; a version that cannot be used is refused and the
one before stays. Rows hold the encoder they began with. Each replica polls for itself: a look-up is milliseconds, the
weights must come to each anyway, and nothing shared can fail them all.
"""

import hashlib
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from craftor.diffuser import Diffuser
from craftor.encoders import Encoder, EncoderRefused, UnknownEncoder, Version, load_encoder
from craftor.registry import BundleError
from craftor.serving.settings import Canary
from craftor.tracking import TrackingUnreachable

CANARY = "#canary"
"""After an encoder's name: the version that is tried."""
Resolve = Callable[[str], Version]
Discover = Callable[[], Mapping[str, str]]
"""Names in the registry and the references that lead to them: what is served beside what the settings name."""


class NotServed(ValueError):
    """No encoder of that name is served; the message lists those that are."""


class Library:
    """Encoders of one base, by the name mixtures use."""

    def __init__(
        self,
        base: Diffuser,
        sources: Mapping[str, str],
        resolve: Resolve | None,
        canaries: Mapping[str, Canary] = MappingProxyType({}),
        discover: Discover = dict,
    ) -> None:
        """Load every source. Raises what `load_encoder` and `resolve` raise: a server starts whole or not at all.

        What is discovered is not promised by the settings: of that, what cannot be used is only noted in `problems`.
        """
        self.base, self._resolve, self._discover = base, resolve, discover
        self.sources = dict(sources) | {name + CANARY: canary.source for name, canary in canaries.items()}
        self._shares = {name: canary.share for name, canary in canaries.items()}
        self.problems: dict[str, str] = {}
        """By name, or `registry`: why what is served is not what the registry says."""
        self._pinned: dict[str, Version] = {}
        self._refused: dict[str, str] = {}
        """Why a version was refused, by its URI: it is not tried again, for versions do not change."""
        self._table: dict[str, Encoder] = {}
        for name, source in self.sources.items():
            self._table[name] = self._load(name, source)
        self._folders = {name for name in self._table if name not in self._pinned}
        self.refresh()

    @property
    def table(self) -> Mapping[str, Encoder]:
        return self._table

    @property
    def versions(self) -> Mapping[str, Version]:
        """By name, of those that come from the registry."""
        return self._pinned

    def find(self, name: str, caller: str = "") -> Encoder:
        """By the name it is served under, its source (`style@champion`), or the version it has now (`style/3`).

        Of a name with a canary, or its source, `caller` decides which version: always the same for the same caller.
        """
        table = self._table
        served = name if name in table else next((one for one in table if self.sources[one] == name), None)
        if served is not None:
            return table[served + CANARY if _draw(served, caller) < self._shares.get(served, 0.0) else served]
        for encoder in table.values():
            if name == f"{encoder.name}/{encoder.version}":
                return encoder
        raise NotServed(f"no encoder {name!r} is served here; there are: {', '.join(table) or 'none'}")

    def refresh(self) -> None:
        """Follow aliases that have moved. Never raises for what the registry or a bundle does; see `problems`."""
        problems: dict[str, str] = {}
        table = dict(self._table)
        try:
            found = self._discover()
            self.sources = self.sources | {name: found[name] for name in found if name not in self.sources}
            for name in (name for name in self.sources if name not in self._folders):
                try:
                    table[name] = self._load(name, self.sources[name])
                except (BundleError, EncoderRefused, UnknownEncoder) as error:
                    problems[name] = str(error)
        except TrackingUnreachable as error:
            problems["registry"] = str(error)
        self._table, self.problems = table, problems

    def _load(self, name: str, source: str) -> Encoder:
        if Path(source).is_dir():
            return load_encoder(Path(source), self.base)
        if self._resolve is None:
            raise UnknownEncoder(f"{name} = {source!r}: no such folder, and no registry is in use")
        version = self._resolve(source)
        before = self._table.get(name)
        if before is not None and version.uri == self._pinned[name].uri:
            self._pinned[name] = version  # its other aliases and its scores may be new
            return before
        if version.uri in self._refused:
            raise EncoderRefused(self._refused[version.uri])
        try:
            loaded = load_encoder(version, self.base)
        except (BundleError, EncoderRefused) as error:
            self._refused[version.uri] = str(error)
            raise
        self._pinned[name] = version
        return loaded


def _draw(name: str, caller: str) -> float:
    """A number in [0, 1) that follows from who asks for what."""
    digest = hashlib.blake2b(f"{name}/{caller}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


class Watcher:
    """A thread that refreshes a library; `hint` makes it look at once."""

    def __init__(self, library: Library, seconds: float) -> None:
        self._library, self._seconds = library, seconds
        self._due, self._stopping = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="craftor-watcher", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def hint(self) -> None:
        self._due.set()

    def stop(self) -> None:
        self._stopping = True
        self._due.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            self._due.wait(self._seconds)
            self._due.clear()
            if self._stopping:
                return
            self._library.refresh()
