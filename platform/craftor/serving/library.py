"""The text encoders that are served: those of the settings and of the registry, and who gets a version on trial."""

import hashlib
from collections.abc import Mapping
from types import MappingProxyType

from craftor.diffuser import Diffuser
from craftor.encoders import Encoder, load_encoder
from craftor.serving.settings import Canary
from craftor.serving.shelf import Discover, Resolve, Shelf

CANARY = "#canary"
"""After an encoder's name: the version that is tried."""


class NotServed(ValueError):
    """No encoder of that name is served; the message lists those that are."""


class Library(Shelf[Encoder]):
    """Encoders of one base, by the name mixtures use."""

    def __init__(
        self,
        base: Diffuser,
        sources: Mapping[str, str],
        resolve: Resolve | None,
        canaries: Mapping[str, Canary] = MappingProxyType({}),
        discover: Discover = dict,
    ) -> None:
        """As a `Shelf`; the canaries' sources are served under their names and `CANARY`."""
        self._shares = {name: canary.share for name, canary in canaries.items()}
        tried = {name + CANARY: canary.source for name, canary in canaries.items()}
        super().__init__(lambda found: load_encoder(found, base), dict(sources) | tried, resolve, discover)

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


def _draw(name: str, caller: str) -> float:
    """A number in [0, 1) that follows from who asks for what."""
    digest = hashlib.blake2b(f"{name}/{caller}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
