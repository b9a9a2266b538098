"""SIGTERM at the driver, or notice that a node will go -> every training worker, between two steps.

`ray job stop`, Kubernetes and most schedulers send SIGTERM to the driver: the workers save a checkpoint and end. A node
that will go tells Ray: the workers save one at once and go on, and Ray Train starts again without the node.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from types import FrameType
from typing import Any

import ray
import ray.train
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from craftor.remote import StopRequest

ASK_EVERY_SECONDS = 1.0
"""Asking Ray Train about preemption is a call to an actor that all workers make together."""


class Interrupted(RuntimeError):
    """The run was asked to stop and has saved its last step; the message says how to go on."""

    exit_code = 143
    """As the shell says it: 128 + SIGTERM."""


class Next(IntEnum):
    """What the workers do after a step; where reasons meet, the largest counts."""

    STEP = 0
    REPORT = 1
    """Hand a checkpoint to Ray Train, to be validated."""
    ASK = 2
    """Ask Ray Train whether a node will go."""
    SAVE_AND_END = 3
    END = 4


class Sigterm:
    """Whether it came."""

    came = False


@contextmanager
def heeding_sigterm(processes: int) -> Iterator[tuple[Any, Sigterm]]:
    """Turn SIGTERM into a stop request for the time of the block; yields the request and whether a signal came.

    Workers with processes of their own hear of it from an actor; without any, the signal is the request. A second
    SIGTERM does what it did before the block. Only a process's main thread can catch signals: in any other, none is
    heeded.
    """
    seen = Sigterm()
    actor = _on_this_node(StopRequest) if processes else None
    if threading.current_thread() is not threading.main_thread():
        yield actor or seen, seen
        return
    before = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        seen.came = True
        signal.signal(signal.SIGTERM, before)
        if actor is not None:
            # Not from the handler itself: it may have interrupted a call into Ray that holds a lock.
            threading.Thread(target=lambda: ray.get(actor.make.remote()), daemon=True).start()

    signal.signal(signal.SIGTERM, on_signal)
    try:
        yield actor or seen, seen
    finally:
        signal.signal(signal.SIGTERM, before)
        if actor is not None:
            ray.kill(actor)


def _on_this_node(actor: type) -> Any:
    """Any other may go, and training goes on without it."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(actor).options(num_cpus=0, scheduling_strategy=here).remote()


class Listener:
    """Worker 0's ear."""

    def __init__(self, request: Any) -> None:
        self.request = request if isinstance(request, Sigterm) else request.made.remote()
        self.ask_at = time.monotonic() + ASK_EVERY_SECONDS

    def heard(self) -> Next:
        if self._came():
            return Next.SAVE_AND_END
        if time.monotonic() < self.ask_at:
            return Next.STEP
        self.ask_at = time.monotonic() + ASK_EVERY_SECONDS
        return Next.ASK

    def _came(self) -> bool:
        if isinstance(self.request, Sigterm):
            return self.request.came
        if not ray.wait([self.request], timeout=0)[0]:
            return False
        try:
            ray.get(self.request)
        except RayActorError:  # whoever would have asked is gone: that is no request
            return False
        return True


class Preemptions:
    """Nodes that will go, each told once."""

    def __init__(self) -> None:
        self.known: set[str] = set()

    def new(self) -> list[str]:
        """Ids of nodes that Ray has not said this of before. All workers call it together, and get the same."""
        info = ray.train.get_preemption_info()
        nodes = [] if info is None else [node for node in info.preempted_node_ids if node not in self.known]
        self.known.update(nodes)
        return nodes
