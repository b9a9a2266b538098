"""Waiting for what other threads and processes do."""

import subprocess
import time
from collections.abc import Callable


def wait_for(condition: Callable[[], bool], process: subprocess.Popen | None = None, seconds: float = 600) -> None:
    """Long: beside other lanes of tests a process may take minutes to start. At once an error where `process` ends."""
    started = time.monotonic()
    while not condition():
        assert process is None or process.poll() is None, f"it ended by itself with {process.returncode}"
        assert time.monotonic() - started < seconds, f"waited {seconds:g} s in vain"
        time.sleep(0.02)
