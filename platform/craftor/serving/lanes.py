"""Rows of one latent shape, which can share UNet calls: those that wait, and those on their way."""

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
