"""Peak memory of this process and all its descendants, Ray's daemons and workers included."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

_INTERVAL_SECONDS = 2.0


class Peak:
    """`gib` holds the largest sum seen so far."""

    gib = 0.0


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Sample while the block runs. As proportional set size, shared pages (libraries, object store) count once."""
    peak, done = Peak(), threading.Event()

    def watch() -> None:
        while not done.wait(_INTERVAL_SECONDS):
            peak.gib = max(peak.gib, _proportional_gib())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def _proportional_gib() -> float:
    total = 0
    own = psutil.Process()
    for process in [own, *own.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue  # it ended between listing and asking
    return total / 2**30
