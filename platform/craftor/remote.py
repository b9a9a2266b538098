"""What Ray's processes unpickle first: only the standard library is imported here.

An actor's process imports the module of its class, and one that only waits has no use for Ray Train and torch; a
worker's own imports are quicker for what is done before they begin.
"""

import asyncio
import gc
from typing import Any


def train(config: dict[str, Any]) -> None:
    """`worker.train_worker`, which is imported where it runs."""
    gc.disable()  # a fifth of the time of imports is the collector's, which walks what is there over and over
    try:
        from craftor.worker import train_worker
    finally:
        gc.enable()
    train_worker(config)


class StopRequest:
    """An actor that the driver tells, and that worker 0 waits on without ever blocking."""

    def __init__(self) -> None:
        self.event = asyncio.Event()

    async def make(self) -> None:
        self.event.set()

    async def made(self) -> None:
        await self.event.wait()
