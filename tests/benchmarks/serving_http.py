"""The endpoint in a process and on a core of its own, and a client that puts open-loop load on it.

`python -m benchmarks.serving_http SETTINGS.json` is the server: one replica behind uvicorn, as Ray Serve runs it.
"""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil


@dataclass
class Answers:
    """What a client got."""

    statuses: Counter = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list, repr=False)
    """Of answers with images."""
    ended: list[tuple[float, float]] = field(default_factory=list, repr=False)
    """The same: when they came, in seconds from the start, and the request's share of the work of all, in requests."""

    @property
    def p95(self) -> float:
        return float(np.percentile(self.latencies, 95))

    def rate(self, since: float, until: float) -> float:
        """Images/s in a time, each counted by its work, for an overfull queue takes cheap ones in more often."""
        return sum(work for at, work in self.ended if since <= at < until) / (until - since)

    @property
    def failures(self) -> int:
        """Answers that are not images and not 429, hang-ups by the server included."""
        return sum(count for status, count in self.statuses.items() if status not in (200, 429))


@contextmanager
def server(settings: dict[str, Any], folder: Path, core: int) -> Iterator[tuple[str, psutil.Process]]:
    """The server's URL, and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = folder / "serving.json"
    path.write_text(json.dumps(settings | {"http": {"port": port}}))
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-m", "benchmarks.serving_http", str(path), str(core)])
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + 120
    try:
        while not _answers(url):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError("the server does not start")
            time.sleep(0.1)
        yield url, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(30)


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


async def load(url: str, bodies: Sequence[dict[str, Any]], rate: float, seed: int) -> Answers:
    """Poisson arrivals at `rate` a second, whatever becomes of the ones before."""
    drawn = np.random.default_rng(seed)
    arrivals = np.cumsum(drawn.exponential(1 / rate, len(bodies)))
    work = np.array([body["steps"] * (1 + (body["guidance_scale"] > 1)) for body in bodies])
    work = work / work.mean()
    answers, began = Answers(), time.perf_counter()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:

        async def one(body: dict[str, Any], at: float, work: float) -> None:
            await asyncio.sleep(max(0.0, at - (time.perf_counter() - began)))
            try:
                status = (await client.post("/v1/images/generations", json=body)).status_code
            except httpx.TransportError as error:
                answers.statuses[type(error).__name__] += 1
                return
            answers.statuses[status] += 1
            if status == 200:
                now = time.perf_counter() - began
                answers.latencies.append(now - at)
                answers.ended.append((now, work))

        await asyncio.gather(*(one(*its) for its in zip(bodies, arrivals, work, strict=True)))
    return answers


def resident_mib(process: psutil.Process) -> float:
    return process.memory_info().rss / 2**20


def main() -> None:
    path, core = Path(sys.argv[1]), int(sys.argv[2])
    os.sched_setaffinity(0, {core})
    import torch

    torch.set_num_threads(1)
    import uvicorn

    from craftor.serving.api import build_app
    from craftor.serving.service import service
    from craftor.serving.settings import parse

    settings = parse(json.loads(path.read_text()), str(path))
    quiet: dict[str, Any] = {"log_level": "error", "access_log": False}
    with service(settings) as one:
        # As on Ray Serve; uvicorn's own 5 s are httpx's too, so that one may hang up as the other begins to ask.
        uvicorn.run(build_app(one), host="127.0.0.1", port=settings.http.port, timeout_keep_alive=90, **quiet)


if __name__ == "__main__":
    main()
