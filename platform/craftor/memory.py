"""Memory: the peak of this process and all its descendants, and what autograd's graphs hold."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import psutil
import torch
from torch import Tensor

_INTERVAL_SECONDS = 2.0
_OWN_INTERVAL_SECONDS = 0.005


class Peak:
    """`gib` holds the largest sum seen so far."""

    gib = 0.0


@contextmanager
def peak_memory() -> Iterator[Peak]:
    """Sample while the block runs. As proportional set size, shared pages (libraries, object store) count once."""
    with _sampled(_proportional_gib, _INTERVAL_SECONDS) as peak:
        yield peak


@contextmanager
def own_peak_memory() -> Iterator[Peak]:
    """The largest resident set of this process alone, sampled often enough for one step of a small model."""
    own = psutil.Process()
    with _sampled(lambda: own.memory_info().rss / 2**30, _OWN_INTERVAL_SECONDS) as peak:
        yield peak


@contextmanager
def _sampled(measure: Callable[[], float], interval: float) -> Iterator[Peak]:
    peak, done = Peak(), threading.Event()

    def watch() -> None:
        while not done.wait(interval):
            peak.gib = max(peak.gib, measure())

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


class Graph:
    """`bytes` is what a graph keeps for backward, each storage once."""

    bytes = 0


@contextmanager
def graph_size(parameters: Iterable[Tensor] = ()) -> Iterator[Graph]:
    """Count what the block's autograd graphs keep beyond `parameters`, which are there anyway."""
    graph, seen = Graph(), {parameter.untyped_storage().data_ptr() for parameter in parameters}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            graph.bytes += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        yield graph


def resident_bytes(device: torch.device) -> int:
    """Memory in use on the device: this process's resident set on CPU, what torch has allocated on CUDA."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss
