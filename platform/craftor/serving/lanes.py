"""Rows that can share UNet calls, those that wait and those on their way: a lane for each latent shape and company."""

import heapq
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from craftor.denoise import Guided
from craftor.diffuser import Diffuser
from craftor.serving.admission import FairQueue, Load
from craftor.serving.batch import network
from craftor.serving.work import ImageRequest, Row

Shape = tuple[int, int, int]
Key = tuple[Shape, tuple[str, int, bool] | None]
"""Of a lane: the latents' shape, and what else its rows have in common."""


@dataclass
class Lane:
    """Rows join and leave between calls; how many there are is for `slots` of the engine to bound."""

    key: Key
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
            row = self.waiting.pop(free, self._suits)
            if row is None:
                return joined, "misfit_or_encoding" if len(self.waiting) else "nothing_waiting"
            self.running.append(row)
            joined.append(row)
        return joined, "full"

    def _suits(self, row: Row) -> bool:
        """Two versions of an object encoder may meet in a lane, while one takes the other's place; a call has one."""
        if (shown := row.request.shown) is None:
            return True
        there = (one.request.shown for one in self.running)
        return all(other is None or other.encoder.sha256 == shown.encoder.sha256 for other in there)


class Lanes:
    """Every lane, that whose turn is next first. Not thread-safe where it opens one: the engine holds its lock."""

    def __init__(self, base: Diffuser, profile: Mapping[int, float]) -> None:
        """`profile` is of the model's own latents: seconds of a UNet call by its bucket, of all that calls may have."""
        self._base, self._profile, self.capacity = base, dict(profile), max(profile)
        self._lanes: OrderedDict[Key, Lane] = OrderedDict()

    def __iter__(self) -> Iterator[Lane]:
        return iter(list(self._lanes.values()))

    def __len__(self) -> int:
        return len(self._lanes)

    def of(self, request: ImageRequest) -> Lane:
        """A request's lane, opened by the first that needs it."""
        return self.open((self.shape(request.size), request.company))

    def open(self, key: Key) -> Lane:
        if key not in self._lanes:
            seconds = {size: self._pixels(key[0]) * seconds for size, seconds in self._profile.items()}
            self._lanes[key] = Lane(key, network(self._base, key[0]), seconds)
        return self._lanes[key]

    def had_its_turn(self, lane: Lane) -> None:
        self._lanes.move_to_end(lane.key)

    def shape(self, size: tuple[int, int] | None) -> Shape:
        """Of latents for a height and width in pixels, by default the model's own."""
        if size is None:
            return self._base.latent_shape
        height, width = (side // self._base.pixels_per_latent for side in size)
        return self._base.latent_shape[0], height, width

    def step_seconds(self, request: ImageRequest) -> float:
        """Of a full call with this request in it, as its lane has measured it or the model's own shape lets expect."""
        shape = self.shape(request.size)
        lane = self._lanes.get((shape, request.company))
        return lane.seconds[self.capacity] if lane else self._pixels(shape) * self._profile[self.capacity]

    def done_in(self, rows: Sequence[Row]) -> float:
        """Seconds until the last of these new rows is done, after all that is ahead of them; lanes take turns."""
        lane = self.of(rows[0].request)  # a request's images are of one size and show one object
        others = sum(bool(other.running or len(other.waiting)) for other in self if other is not lane)
        return lane.done_in(rows, self.capacity, (1 + others) * lane.seconds[self.capacity])

    def load(self) -> Load:
        """Work waiting and on its way."""
        running = sum(row.cost * row.remaining / row.taken for lane in self for row in lane.running)
        return Load(sum(row.cost for lane in self for row in lane.waiting), running)

    def _pixels(self, shape: Shape) -> float:
        """Of a shape, over those of the model's own: a first guess of how much longer its steps take."""
        return shape[1] * shape[2] / (self._base.latent_shape[1] * self._base.latent_shape[2])


def _occupy(free: list[float], row: Row, seconds: float) -> float:
    """Give a row those slots that are free first, of a heap of when each is; returns when it is done."""
    done = max(heapq.heappop(free) for _ in range(row.request.slots)) + row.remaining * seconds
    for _ in range(row.request.slots):
        heapq.heappush(free, done)
    return done
