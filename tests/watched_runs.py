"""Watch a run from outside, do something to it on the way, compare what it left."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from craftor import checkpoint, ledger
from craftor.run_files import METRICS

TRAIN = [sys.executable, "-m", "craftor", "train"]
SHORT = {"run.num_steps": 12, "register": None}
"""Recipe changes of `conftest.undisturbed`."""
TWO = {"workers.num": 2, "run.num_steps": 60, "register": None}
"""Recipe changes of `conftest.undisturbed_of_two`, with those of `long_epochs`."""


class doing:
    """A thread beside the block; what it raises is raised on leaving."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.work, self.error = work, None

    def __enter__(self) -> None:
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.thread.join(timeout=60)
        if self.error is not None:
            raise self.error

    def run(self) -> None:
        try:
            self.work()
        except (AssertionError, OSError) as error:
            self.error = error


def long_epochs(folder: Path, num_rows: int = 80) -> dict[str, str]:
    """Recipe changes: as many prompts, for every epoch begins by starting the processes that read its rows."""
    path = folder / f"{num_rows}.txt"
    path.write_text("".join(f"a red star above {number} rings\n" for number in range(num_rows)))
    return {"data.path": str(path)}


def num_steps(out: Path) -> int:
    """Steps written down so far."""
    return len((out / METRICS).read_bytes().splitlines()) if (out / METRICS).exists() else 0


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / METRICS).read_text().splitlines()]


def last_step(out: Path) -> int:
    """Of the newest complete checkpoint; 0 where there is none."""
    last = checkpoint.latest(out)
    return 0 if last is None else checkpoint.step_of(last)


def num_workers(out: Path) -> int:
    """That made the newest checkpoint's last steps; 0 where there is none."""
    last = checkpoint.latest(out)
    if last is None:
        return 0
    return json.loads((last / "trainer" / ledger.FILE).read_text().splitlines()[-1])["workers"]


def weights(out: Path) -> dict[str, torch.Tensor]:
    last = checkpoint.latest(out)
    assert last is not None
    return load_file(last / "trainer" / "module.safetensors")


def assert_same_weights(ours: Path, expected: Path) -> None:
    found, wanted = weights(ours), weights(expected)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def assert_undisturbed(ours: Path, expected: Path) -> None:
    """Bit for bit, every step written down once, every sample used once."""
    assert_same_weights(ours, expected)
    assert [line["loss"] for line in lines(ours)] == [line["loss"] for line in lines(expected)]
    assert ledger.audit(ours) == ledger.audit(expected)


def assert_close(ours: Path, expected: Path) -> None:
    """For other numbers of workers: losses and weights to 1e-5."""
    for own, wanted in zip(lines(ours), lines(expected), strict=True):
        assert own["loss"] == pytest.approx(wanted["loss"], rel=1e-5, abs=1e-5), own["step"]
    found = weights(ours)
    for name, tensor in weights(expected).items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5, msg=name)


def processes(title: str) -> list[psutil.Process]:
    """This process's descendants whose command line has `title` in it."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if title in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def end(process: subprocess.Popen) -> None:
    """Kill it and all it has started; nothing where it ended by itself."""
    if process.poll() is None:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for member in family:
            try:
                member.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        process.wait()
