"""Requests in flight, by id, so that whoever asked can call one off."""

import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from craftor.serving.engine import Engine
from craftor.serving.errors import ApiError
from craftor.serving.work import Row

NOT_HERE = -1


@dataclass
class Jobs:
    """Of one replica."""

    engine: Engine
    _running: dict[str, tuple[str, list[Row]]] = field(default_factory=dict)

    def name(self, wanted: str | None) -> str:
        """An id: the caller's own, by which it can cancel a request that it still waits for, or a new one."""
        if wanted is None:
            return f"job-{secrets.token_hex(12)}"
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", wanted):
            message = "X-Job-Id: 1 to 64 letters, digits, '.', '_', '-'"
            raise ApiError(400, message, param="X-Job-Id", code="invalid_value")
        if wanted in self._running:
            raise ApiError(409, f"a job {wanted!r} is in flight", param="X-Job-Id", code="job_exists")
        return wanted

    @contextmanager
    def running(self, job: str, client: str, rows: list[Row]) -> Iterator[None]:
        """For the time of the block; whatever ends it, no row of the job goes on after it."""
        self._running[job] = client, rows
        try:
            yield
        finally:
            del self._running[job]
            self.engine.cancel(rows)

    def cancel(self, job: str, client: str) -> int:
        """How many images were given up; NOT_HERE for a job that is not in flight, or another client's."""
        owner, rows = self._running.get(job, (None, []))
        return self.engine.cancel(rows) if owner == client else NOT_HERE
