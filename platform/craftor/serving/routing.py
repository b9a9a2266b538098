"""Which replica a request goes to: rather one that holds the encoders its `X-Encoders` header names.

A router sees headers and no bodies. Every replica holds every name, but not the same versions while a promotion comes
to one after the other, or where one of them refuses it: who asks for `style/4` by its number says so in the header too.
"""

import random

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

HEADER = b"x-encoders"
"""Names or `name/version`s, with commas between them."""
HELD = "encoders"
"""In the statistics that replicas give of themselves."""


class PreferHolders(RequestRouter):
    """Two replicas at random, of which Serve takes the one with less to do; of holders first, then of all others."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        wanted = _wanted(pending_request)
        ranks: tuple[list[RunningReplica], list[RunningReplica]] = [], []
        for replica in candidate_replicas:
            ranks[not wanted <= set(replica.routing_stats.get(HELD, ()))].append(replica)
        return [random.sample(rank, min(2, len(rank))) for rank in ranks if rank]


def _wanted(request: PendingRequest | None) -> set[str]:
    """Empty for what does not come over HTTP, such as one replica's call to all."""
    scope = getattr(request.args[0], "asgi_scope", None) if request is not None and request.args else None
    given = dict(scope["headers"]).get(HEADER, b"").decode("latin-1") if scope is not None else ""
    return {name for part in given.split(",") if (name := part.strip())}
