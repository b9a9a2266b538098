"""Who may ask, and how much: bearer tokens known by their hashes, each with a rate of requests and of work."""

import hashlib
import hmac
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from craftor.serving.admission import Rejected
from craftor.serving.errors import ApiError
from craftor.serving.settings import Token


@dataclass
class Allowance:
    """A leaky bucket that a minute fills."""

    per_minute: float
    left: float = field(init=False)
    at: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.left = self.per_minute

    def take(self, amount: float, what: str) -> None:
        """Raises Rejected where it is spent. What costs more than a minute's worth passes a full bucket, into debt."""
        now = time.monotonic()
        self.left = min(self.per_minute, self.left + (now - self.at) * self.per_minute / 60)
        self.at = now
        needed = min(amount, self.per_minute)
        if self.left < needed:
            wait = (needed - self.left) * 60 / self.per_minute
            raise Rejected(f"your limit of {self.per_minute:g} {what} a minute is spent", wait, "rate_limit_exceeded")
        self.left -= amount

    def give_back(self, amount: float) -> None:
        self.left = min(self.per_minute, self.left + amount)


class Gate:
    """Without tokens everybody is `anonymous`, and unlimited but for the queue."""

    def __init__(self, tokens: Mapping[str, Token]) -> None:
        self._tokens = dict(tokens)
        self._requests = {name: Allowance(token.requests_per_minute) for name, token in tokens.items()}
        self._seconds = {name: Allowance(token.seconds_per_minute) for name, token in tokens.items()}

    def client(self, authorization: str | None) -> str:
        """The name of the token's owner. Raises ApiError 401."""
        if not self._tokens:
            return "anonymous"
        scheme, _, token = (authorization or "").partition(" ")
        digest = hashlib.sha256(token.strip().encode()).hexdigest()
        found = [name for name, known in self._tokens.items() if hmac.compare_digest(known.sha256, digest)]
        if scheme.lower() != "bearer" or not found:
            said = "no bearer token was given" if not authorization else "the bearer token is not known"
            headers = {"WWW-Authenticate": "Bearer"}
            raise ApiError(401, f"{said}: send 'Authorization: Bearer TOKEN'", code="invalid_api_key", headers=headers)
        return found[0]

    @contextmanager
    def charge(self, client: str, seconds: float) -> Iterator[None]:
        """Count one request of so many seconds of work; the work only if the block takes it. Raises Rejected."""
        if client not in self._tokens:
            yield
            return
        self._requests[client].take(1, "requests")
        self._seconds[client].take(seconds, "seconds of work")
        try:
            yield
        except Rejected:
            self._seconds[client].give_back(seconds)
            raise
