"""Who looks at the registry, and when: a thread of each replica, of which one looks for all.

On Ray Serve the replica of rank 0 looks every `poll_seconds`, or at once when hinted, and tells every replica what it
saw, however little has moved: one that has just begun, or was busy, hears it the next time. So a registry is asked as
often by forty replicas as by one, and a promotion comes to all of them together. Where that replica ends, Serve gives
its rank to another, which looks from then on.
"""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from craftor.serving.shelf import Shelf, Sighting

PATIENCE = 10
"""So many times `seconds`, and half a minute: who has heard nothing of the registry for so long says so."""


Seen = tuple[Sighting, ...]
"""Of each shelf, in order."""


class Watcher:
    """Refreshes shelves in a thread of its own; `hint` makes it look at once."""

    def __init__(
        self,
        shelves: Sequence[Shelf[Any]],
        seconds: float,
        leads: Callable[[], bool] = lambda: True,
        tell: Callable[[Seen], None] | None = None,
    ) -> None:
        """`leads` says whether this one looks; `tell` brings what it sees to all others, whose `hear` takes it."""
        self._shelves, self._seconds, self._leads, self._tell = shelves, seconds, leads, tell
        self._told: queue.SimpleQueue[Seen | bool] = queue.SimpleQueue()
        self._heard_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="craftor-watcher", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def problem(self) -> str | None:
        """Why what is served may not be what the registry says."""
        if not self.alive:
            return "the thread that follows the registry has ended; the log says why"
        silent = time.monotonic() - self._heard_at
        if silent > PATIENCE * self._seconds + 30:
            return f"no replica has told of the registry for {silent:.0f} s"
        return None

    def hint(self) -> None:
        """Look now, if it is for this one to look."""
        self._told.put(True)

    def hear(self, seen: Seen) -> None:
        """From the replica that looks."""
        self._told.put(seen)

    def stop(self) -> None:
        self._told.put(False)
        self._thread.join()

    def _run(self) -> None:
        while (told := self._next()) is not False:
            if isinstance(told, tuple):
                self._follow(told)
            elif self._leads():
                self._follow(seen := tuple(shelf.look() for shelf in self._shelves))
                if self._tell is not None:
                    self._tell(seen)

    def _next(self) -> Seen | bool:
        try:
            return self._told.get(timeout=self._seconds)
        except queue.Empty:
            return True

    def _follow(self, seen: Seen) -> None:
        self._heard_at = time.monotonic()
        for shelf, sighting in zip(self._shelves, seen, strict=True):
            shelf.follow(sighting)
