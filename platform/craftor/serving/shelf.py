"""What is served by name, loaded and checked first, then swapped in, while requests go on: encoders of either kind.

A name stands for a source: a bundle's folder, or a reference into the registry whose alias may move. Looking the
references up again (`look`) and following what was seen (`follow`) are two, so that one replica can look for all
(`watcher`). A version that cannot be used is refused and the one before stays; rows hold what they began with.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from safetensors import SafetensorError

from craftor.encoders import EncoderRefused, UnknownEncoder, Version
from craftor.registry import BundleError
from craftor.tracking import TrackingUnreachable, reason

Resolve = Callable[[str], Version]
Discover = Callable[[], Mapping[str, str]]
"""Names in the registry and the references that lead to them: what is served beside what the settings name."""


UNFORESEEN = (OSError, MemoryError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, SafetensorError)
"""What loading may raise beside a refusal: for want of memory or files, or for a content that nobody has thought of."""


class _Loaded(Protocol):
    """A version of something, as it was loaded."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str | None: ...
    @property
    def uri(self) -> str: ...


T = TypeVar("T", bound=_Loaded)


@dataclass(frozen=True)
class Sighting:
    """What the registry said at a moment."""

    references: Mapping[str, str]
    """By name: all that were discovered so far, for a replica may have missed any other sighting."""
    versions: Mapping[str, Version]
    """By name: what its reference leads to."""
    problems: Mapping[str, str]
    """By name, or `registry`: why there is no version to follow."""


class Shelf(Generic[T]):
    """Things by name, each of the version that its source leads to."""

    def __init__(
        self,
        load: Callable[[Version | Path], T],
        sources: Mapping[str, str],
        resolve: Resolve | None,
        discover: Discover = dict,
    ) -> None:
        """Load every source. Raises what `load` and `resolve` raise: a server starts whole or not at all.

        What is discovered is not promised by the settings: of that, what cannot be used is only noted in `problems`.
        """
        self.sources = dict(sources)
        self._own = frozenset(sources)
        self.problems: dict[str, str] = {}
        """By name, or `registry`: why what is served is not what the registry says."""
        self._read, self._resolve, self._discover = load, resolve, discover
        self._pinned: dict[str, Version] = {}
        self._refused: dict[str, str] = {}
        """Why a version was refused, by its URI: it is not tried again, for versions do not change."""
        self._table: dict[str, T] = {}
        for name, source in self.sources.items():
            self._table[name] = self._load(name, source)
        self._folders = {name for name in self._table if name not in self._pinned}
        self.refresh()

    @property
    def table(self) -> Mapping[str, T]:
        return self._table

    @property
    def versions(self) -> Mapping[str, Version]:
        """By name, of those that come from the registry."""
        return self._pinned

    def refresh(self) -> None:
        """Look, and follow what is seen."""
        self.follow(self.look())

    def look(self) -> Sighting:
        """Ask the registry what each reference means now. Never raises for what it answers; see its `problems`."""
        problems: dict[str, str] = {}
        references: dict[str, str] = {}
        found: dict[str, Version] = {}
        try:
            sources = {**self._discover(), **self.sources}
            references = {name: source for name, source in sources.items() if name not in self._own}
            for name, source in sources.items():
                if name not in self._folders:
                    try:
                        found[name] = self._version(name, source)
                    except UnknownEncoder as error:
                        problems[name] = str(error)
        except TrackingUnreachable as error:
            problems["registry"] = str(error)
        return Sighting(references, found, problems)

    def follow(self, seen: Sighting) -> None:
        """Swap in what has moved. Never raises for what a bundle is or cannot be loaded for; see `problems`."""
        problems = dict(seen.problems)
        table = dict(self._table)
        self.sources = self.sources | dict(seen.references)
        for name, version in seen.versions.items():
            try:
                table[name] = self._load_version(name, version)
            except (BundleError, EncoderRefused, TrackingUnreachable) as error:
                problems[name] = str(error)
            except UNFORESEEN as error:
                problems[name] = f"{version.uri}: cannot be loaded ({type(error).__name__}: {reason(error)})"
        self._table, self.problems = table, problems

    def _load(self, name: str, source: str) -> T:
        if Path(source).is_dir():
            return self._read(Path(source))
        return self._load_version(name, self._version(name, source))

    def _version(self, name: str, source: str) -> Version:
        if self._resolve is None:
            raise UnknownEncoder(f"{name} = {source!r}: no such folder, and no registry is in use")
        return self._resolve(source)

    def _load_version(self, name: str, version: Version) -> T:
        before = self._table.get(name)
        if before is not None and version.uri == self._pinned[name].uri:
            self._pinned[name] = version  # its other aliases and its scores may be new
            return before
        if version.uri in self._refused:
            raise EncoderRefused(self._refused[version.uri])
        try:
            loaded = self._read(version)
        except (BundleError, EncoderRefused) as error:
            self._refused[version.uri] = str(error)
            raise
        self._pinned[name] = version
        return loaded
