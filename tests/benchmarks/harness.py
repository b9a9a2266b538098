"""Variants of one computation -> times taken in turn in one process, peak memory in fresh ones, `runs/bench/*.json`.

Two clocks: the wall's, which is what a user waits for, and the processor's (`time.process_time`), which does not count
the time other programs held the core. With one arithmetic thread on a quiet machine they agree; where they differ the
machine was busy, and the ratios of processor times are the ones to trust.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

# Before anything imports transformers: it warns on import of what this machine has not installed.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "runs" / "bench"
Clock = Literal["wall", "cpu"]
CLOCKS: tuple[Clock, ...] = ("wall", "cpu")
_PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "trl")


@dataclass(frozen=True)
class Times:
    """Seconds of one variant, one entry a round; the same index is the same round for every variant of a run."""

    wall: np.ndarray
    cpu: np.ndarray

    def on(self, clock: Clock) -> np.ndarray:
        return self.wall if clock == "wall" else self.cpu

    def __add__(self, other: "Times") -> "Times":
        return Times(self.wall + other.wall, self.cpu + other.cpu)

    def summary(self) -> dict[str, float]:
        """Median, inter-quartile range and least of both clocks, seconds."""
        figures: dict[str, float] = {}
        for clock in CLOCKS:
            low, median, high = np.percentile(self.on(clock), (25, 50, 75))
            least = self.on(clock).min()
            figures |= {f"{clock}_median": median, f"{clock}_iqr": high - low, f"{clock}_best": least}
        return {name: float(value) for name, value in figures.items()}


def in_turn(variants: Mapping[str, Callable[[], object]], *, rounds: int = 20, warmup: int = 3) -> dict[str, Times]:
    """Call every variant once a round, starting with another one each round, so that none profits from its place."""
    names = list(variants)
    wall = {name: np.empty(rounds) for name in names}
    cpu = {name: np.empty(rounds) for name in names}
    for index in track(range(-warmup, rounds), description="rounds", console=Console(stderr=True), transient=True):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            start_cpu, start = time.process_time(), time.perf_counter()
            variants[name]()
            if index >= 0:
                wall[name][index] = time.perf_counter() - start
                cpu[name][index] = time.process_time() - start_cpu
        if index == -1:
            # What warm-up left behind is not collected again inside somebody's measured step.
            gc.collect()
            gc.freeze()
    gc.unfreeze()
    return {name: Times(wall[name], cpu[name]) for name in names}


def ratio(slow: Times, fast: Times, *, num_resamples: int = 10_000) -> dict[str, float | list[float]]:
    """How many times longer `slow` takes, on both clocks.

    `<clock>` is the ratio of medians, `<clock>_ci95` the percentile bootstrap of the median of the per-round ratios:
    rounds are resampled with their pairs kept, so a slow minute of the machine, which both sides saw, cancels.
    """
    figures: dict[str, float | list[float]] = {}
    for clock in CLOCKS:
        pairs = slow.on(clock) / fast.on(clock)
        drawn = np.random.default_rng(0).integers(len(pairs), size=(num_resamples, len(pairs)))
        figures[clock] = float(np.median(slow.on(clock)) / np.median(fast.on(clock)))
        figures[f"{clock}_ci95"] = [float(x) for x in np.percentile(np.median(pairs[drawn], axis=1), (2.5, 97.5))]
    return figures


def table(title: str, times: Mapping[str, Times], *, images: int | None = None) -> Table:
    """One row a variant: milliseconds by both clocks, and images/s where a call makes so many."""
    out = Table(title=title, title_justify="left")
    out.add_column("variant")
    for column in ("wall ms", "± iqr", "cpu ms", "± iqr", "cpu best", *(["images/s"] if images else [])):
        out.add_column(column, justify="right")
    for name, own in times.items():
        s = own.summary()
        shown = ("wall_median", "wall_iqr", "cpu_median", "cpu_iqr", "cpu_best")
        rate = [f"{images / s['wall_median']:.2f}"] if images else []
        out.add_row(name, *(f"{1e3 * s[key]:.2f}" for key in shown), *rate)
    return out


def write(name: str, *, figures: Mapping[str, float], details: Mapping, started: float) -> Path:
    """`runs/bench/<name>.json`; `started` is the `time.perf_counter()` of the beginning."""
    path = OUT / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "machine": machine(),
        "commit": commit(),
        "seconds": round(time.perf_counter() - started, 1),
        "figures": dict(figures),
        "details": dict(details),
    }
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path


def machine() -> dict[str, str | int | float | dict[str, str]]:
    """What a reader must know to compare: processor, cores, memory, threads, load, versions."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "threads": torch.get_num_threads(),
        "load_average_1min": os.getloadavg()[0],
        "scheduling": {os.SCHED_OTHER: "normal", os.SCHED_IDLE: "idle"}.get(os.sched_getscheduler(0), "other"),
        "python": sys.version.split()[0],
        "versions": {package: found for package in _PACKAGES if (found := _version(package))},
    }


def commit() -> str:
    """The checkout's commit, with `+` where tracked files differ from it."""
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=ROOT, check=False).returncode
    return head.stdout.strip() + ("+" if changed else "")


def peak_memory(factory: str, *, steps: int = 5, **arguments: str | int | float | bool | None) -> dict[str, float]:
    """MiB a variant's steps add to its process, measured in a fresh one, and processor seconds of a step there.

    `factory` is "module:function"; called with `arguments` it returns an object with `step()`. `baseline` is resident
    memory once models, rewards and optimiser are loaded; `peak` is what the steps add to it at most; `total` the sum.
    """
    call = json.dumps({"factory": factory, "steps": steps, "arguments": arguments})
    command = [sys.executable, "-m", "benchmarks.harness", call]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
    return json.loads(done.stdout.splitlines()[-1])


def _measure_peak(factory: str, steps: int, arguments: dict) -> dict[str, float]:
    torch.set_num_threads(1)
    module, function = factory.split(":")
    variant = getattr(import_module(module), function)(**arguments)
    # What loading freed but the allocator still holds would hide as much of what the steps take.
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    # "5" resets the kernel's high-water mark of resident memory, so that loading the models does not count.
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    seconds = []
    for _ in range(steps):
        start = time.process_time()
        variant.step()
        seconds.append(time.process_time() - start)
    total = _resident("VmHWM")
    # The first step also pays for what is made once.
    cpu_seconds = float(np.median(seconds[1:]))
    return {"baseline": before, "peak": total - before, "total": total, "cpu_seconds": cpu_seconds}


def _resident(field: Literal["VmRSS", "VmHWM"]) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    print(json.dumps(_measure_peak(**json.loads(sys.argv[1]))))
