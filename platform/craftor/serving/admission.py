"""Who gets in, and who is next: a queue bounded by the seconds of work in it, shared fairly, no one stuck at its head.

Cost is counted in seconds of a full engine: steps x slots x the measured time of a slot (which grows with the pixels).
Clients take turns by start-time fair queueing (Goyal et al. 1996): a row's tag is the larger of the queue's virtual
time and the end of its client's last row, so whoever asks for a hundred images waits for those who ask for one.
"""

import math
from bisect import insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from craftor.serving.work import Row

PATIENCE = 8
"""So often other rows may overtake one that does not fit; then slots are kept free for it."""


class Rejected(RuntimeError):
    """Too much work is waiting; `retry_after` is when it should be done, in seconds."""

    def __init__(self, message: str, retry_after: float, reason: str) -> None:
        super().__init__(message)
        self.retry_after, self.reason = max(1, math.ceil(retry_after)), reason


@dataclass(order=True)
class _Entry:
    tag: float
    number: int
    row: Row = field(compare=False)


class FairQueue:
    """Rows that wait for a slot, all of one latent shape. Not thread-safe: the engine holds its lock."""

    def __init__(self) -> None:
        self._entries: list[_Entry] = []
        self._ends: dict[str, float] = {}
        self._virtual = 0.0
        self._number = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Row]:
        return (entry.row for entry in self._entries)

    def push(self, row: Row) -> None:
        start = max(self._virtual, self._ends.get(row.client, 0.0))
        self._ends[row.client] = start + row.cost
        self._number += 1
        insort(self._entries, _Entry(start, self._number, row))

    def pop(self, free_slots: int, suits: Callable[[Row], bool] = lambda _: True) -> Row | None:
        """The next row that is encoded, fits and suits, unless one that does not has been passed over too often."""
        for place, entry in enumerate(self._entries):
            if not entry.row.encoded:
                continue
            if entry.row.request.slots <= free_slots and suits(entry.row):
                del self._entries[place]
                self._virtual = max(self._virtual, entry.tag)
                for earlier in self._entries[:place]:
                    earlier.row.passed_over += earlier.row.encoded
                if not self._entries:
                    self._ends.clear()
                return entry.row
            if entry.row.passed_over >= PATIENCE:
                return None
        return None

    def drop(self, rows: Sequence[Row]) -> None:
        """As if they had never been pushed: what is left of their clients' rows, and what follows, moves up."""
        if not rows:
            return
        gone = set(map(id, rows))
        kept: list[_Entry] = []
        spared: dict[str, float] = {}
        for entry in self._entries:
            client = entry.row.client
            if id(entry.row) in gone:
                spared[client] = spared.get(client, 0.0) + entry.row.cost
            else:
                entry.tag = self._earlier(entry.tag, spared.get(client, 0.0))
                kept.append(entry)
        self._entries = sorted(kept)
        for client, cost in spared.items():
            self._ends[client] = self._earlier(self._ends[client], cost)
        if not self._entries:
            self._ends.clear()

    def _earlier(self, tag: float, cost: float) -> float:
        """Not before the virtual time, unless it is so already."""
        return min(tag, max(self._virtual, tag - cost))


@dataclass(frozen=True)
class Load:
    """The engine's work at a moment, in seconds of a full engine."""

    waiting: float
    running: float


def admit(load: Load, cost: float, *, bound: float, expected: float = 0.0, deadline: float | None = None) -> None:
    """Let work of so much cost in, or raise Rejected.

    `bound` is how many seconds of work may wait; an idle engine takes a request of any size. `expected` and `deadline`
    are seconds from now: what will not be done by then is refused while the client can still ask elsewhere.
    """
    if load.waiting > 0 and load.waiting + cost > bound:
        raise Rejected(
            f"{load.waiting:.1f} s of work is waiting and this adds {cost:.1f} s; the limit is {bound:g} s",
            load.waiting + cost - bound,
            "queue_full",
        )
    if deadline is not None and expected > deadline:
        raise Rejected(
            f"done in about {expected:.1f} s, but the deadline is in {deadline:.1f} s",
            expected - deadline,
            "deadline",
        )
