"""Seconds each worker computed -> the one that the others wait for, by name.

Gradients are averaged every step, so one worker ten times slower makes the whole run ten times slower.
"""

import time
from collections import deque
from statistics import median

import ray.util
import torch
from ray.train.torch import get_device

FACTOR, STEPS = 3.0, 10
"""How much slower than the median of the others, over how many steps."""


class Watch:
    """All workers call it every step; only worker 0 gets messages."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.places = [""] * world_size
        if world_size > 1:
            torch.distributed.all_gather_object(self.places, f"worker {rank} on {ray.util.get_node_ip_address()}")
        self.pace = Pace(world_size)

    def after(self, begun: float) -> list[str]:
        """What is to be said of a step whose computing began at `time.perf_counter() = begun` and ends now."""
        if self.world_size == 1:
            return []
        if (device := get_device()).type == "cuda":
            torch.cuda.synchronize(device)
        own = torch.tensor([time.perf_counter() - begun], device=device)
        times = [torch.empty_like(own) for _ in range(self.world_size)]
        torch.distributed.all_gather(times, own)
        slow = self.pace.after([time.item() for time in times])
        return [
            f"{self.places[rank]} takes {factor:.1f} times as long as the others, which wait for it"
            for rank, factor in slow
            if self.rank == 0
        ]


class Pace:
    """The last steps' seconds of every worker; each slow one is told once, until it has been fast again."""

    def __init__(self, world_size: int) -> None:
        self.times: list[deque[float]] = [deque(maxlen=STEPS) for _ in range(world_size)]
        self.told: set[int] = set()

    def after(self, seconds: list[float]) -> list[tuple[int, float]]:
        """Ranks that have become slow, and by what factor."""
        for times, own in zip(self.times, seconds, strict=True):
            times.append(own)
        if len(self.times[0]) < STEPS:
            return []
        typical = [median(times) for times in self.times]
        factors = [own / median(typical[:rank] + typical[rank + 1 :]) for rank, own in enumerate(typical)]
        slow = {rank for rank, factor in enumerate(factors) if factor > FACTOR}
        new, self.told = slow - self.told, slow
        return [(rank, factors[rank]) for rank in sorted(new)]
