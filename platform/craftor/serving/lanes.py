"""Rows of one latent shape, which can share UNet calls: those that wait, and those on their way."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from craftor.denoise import Guided
from craftor.serving.admission import FairQueue
from craftor.serving.work import Row


@dataclass
class Lane:
    """Rows join and leave between calls; how many there are is for `slots` of the engine to bound."""

    unet: Guided
    seconds: dict[int, float]
    """Of a UNet call, by bucket: measured at the start, and followed since."""
    waiting: FairQueue = field(default_factory=FairQueue)
    running: list[Row] = field(default_factory=list)

    @property
    def slots(self) -> int:
        return sum(row.request.slots for row in self.running)

    @property
    def busy(self) -> bool:
        return bool(self.running) or any(row.encoded for row in self.waiting)

    def done_in(self, rows: Sequence[Row], capacity: int, seconds: float) -> float:
        """Seconds until these rows are done if they wait after all others, and a step takes so many."""
        free = [0.0] * capacity
        for row in (*self.running, *self.waiting):
            _occupy(free, row, seconds)
        return max(_occupy(free, row, seconds) for row in rows)

    def clear(self, now: float) -> list[Row]:
        """Let go of cancelled rows, and of waiting ones whose deadline has passed; returns the latter."""
        late = [r for r in self.waiting if r.deadline is not None and now > r.deadline and not r.cancelled]
        for row in late:
            row.cancelled = True
        self.waiting.drop([row for row in self.waiting if row.cancelled])
        self.running = [row for row in self.running if not row.cancelled]
        return late

    def fill(self, capacity: int) -> tuple[list[Row], str]:
        """Let waiting rows join while there are slots: those who did, and why no more did."""
        joined: list[Row] = []
        while (free := capacity - self.slots) > 0:
            row = self.waiting.pop(free)
            if row is None:
                return joined, "misfit_or_encoding" if len(self.waiting) else "nothing_waiting"
            self.running.append(row)
            joined.append(row)
        return joined, "full"


def _occupy(free: list[float], row: Row, seconds: float) -> float:
    """Give a row those slots that are free first, of a heap of when each is; returns when it is done."""
    done = max(heapq.heappop(free) for _ in range(row.request.slots)) + row.remaining * seconds
    for _ in range(row.request.slots):
        heapq.heappush(free, done)
    return done
