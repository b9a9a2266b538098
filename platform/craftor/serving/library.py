"""The encoders that are served, by name: loaded and checked first, then swapped in, while requests go on.

A name stands for a source: a bundle's folder, or a reference into the registry whose alias may move. `refresh` looks
the references up again, and for encoders that are new in the registry; a version that cannot be used is refused and the
one before stays. Rows hold the encoder they began with. Looking (`look`) and following what was seen (`follow`) are
two, so that one replica can look for all (`watcher`).
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Sighting:
    """What the registry said at a moment."""

    references: Mapping[str, str]
    """By name: what is new among those that were discovered."""
    versions: Mapping[str, Version]
    """By name: what its reference leads to."""
    problems: Mapping[str, str]
    """By name, or `registry`: why there is no version to follow."""


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
        """Look, and follow what is seen."""
        self.follow(self.look())

    def look(self) -> Sighting:
        """Ask the registry what each reference means now. Never raises for what it answers; see its `problems`."""
        problems: dict[str, str] = {}
        references: dict[str, str] = {}
        found: dict[str, Version] = {}
        try:
            references = {n: source for n, source in self._discover().items() if n not in self.sources}
            for name, source in (self.sources | references).items():
                if name not in self._folders:
                    try:
                        found[name] = self._version(name, source)
                    except UnknownEncoder as error:
                        problems[name] = str(error)
        except TrackingUnreachable as error:
            problems["registry"] = str(error)
        return Sighting(references, found, problems)

    def follow(self, seen: Sighting) -> None:
        """Swap in what has moved. Never raises for what a bundle is; see `problems`."""
        problems = dict(seen.problems)
        table = dict(self._table)
        self.sources = self.sources | dict(seen.references)
        try:
            for name, version in seen.versions.items():
                try:
                    table[name] = self._load_version(name, version)
                except (BundleError, EncoderRefused) as error:
                    problems[name] = str(error)
        except TrackingUnreachable as error:
            problems["registry"] = str(error)
        self._table, self.problems = table, problems

    def _load(self, name: str, source: str) -> Encoder:
        if Path(source).is_dir():
            return load_encoder(Path(source), self.base)
        return self._load_version(name, self._version(name, source))

    def _version(self, name: str, source: str) -> Version:
        if self._resolve is None:
            raise UnknownEncoder(f"{name} = {source!r}: no such folder, and no registry is in use")
        return self._resolve(source)

    def _load_version(self, name: str, version: Version) -> Encoder:
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
