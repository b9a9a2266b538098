"""Checkpoints of worker 0: its training thread writes the tensors, another hashes, syncs, renames and uploads them.

A checkpoint that cannot be written, for a full disk or a storage that is away, is missed: training goes on from what it
has in memory, and the next one is tried. Only where the last one is missed does the run fail.
"""

import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

from craftor import checkpoint, storage
from craftor.run_files import note

PUSH_SECONDS = 2.0


class CheckpointMissed(RuntimeError):
    """The last checkpoint could not be written; the message names the place and the reason."""


class Saver:
    """One checkpoint is on its way at a time; `url` is `run.storage`, None where the run's folder is its home."""

    def __init__(self, run_dir: Path, url: str | None) -> None:
        self.run_dir, self.url = run_dir, url
        self.executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.pending: Future[None] | None = None
        self.completed: list[int] = []
        """Steps whose checkpoints are where they belong, until someone takes them."""
        self.missed: str | None = None
        self.pushed_at = 0.0

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """`write` fills a folder, before this returns; the rest is done while training goes on."""
        if (folder := self.begin(step)) is not None:
            self.end(folder, step, write)

    def begin(self, step: int, prepare: Callable[[], None] | None = None) -> Path | None:
        """An empty folder for a checkpoint, once the one before is done; None where it is missed.

        `prepare` is done first, and may fail as storage does.
        """
        self.wait()
        try:
            if prepare is not None:
                prepare()
            return checkpoint.begin(self.run_dir, step)
        except storage.failures() as error:
            self._miss(step, error)
            return None

    def end(
        self, folder: Path, step: int, write: Callable[[Path], None], later: Callable[[Path], None] | None = None
    ) -> None:
        """`write` fills the folder now; `later` adds what it makes of its files, while training goes on."""
        try:
            write(folder)
        except (OSError, SafetensorError) as error:  # the latter, which is no OSError, for a disk that is full
            self._miss(step, error)
            return
        self.pending = self.executor.submit(self._complete, folder, step, later)

    def push(self) -> None:
        """Let the driver see the newest metrics, every few seconds, unless a checkpoint is on its way."""
        if self.url is None or time.monotonic() < self.pushed_at + PUSH_SECONDS or not self._idle():
            return
        self.wait()
        self.pushed_at = time.monotonic()
        self.pending = self.executor.submit(self._push)

    def wait(self) -> None:
        """Until the last checkpoint is where it belongs, or missed."""
        if self.pending is not None:
            self.pending.result()
            self.pending = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: object) -> None:
        """Wait. Raises CheckpointMissed where the last checkpoint was."""
        self.wait()
        self._push()
        self.executor.shutdown()
        if self.missed is not None and kind is None:
            raise CheckpointMissed(self.missed)

    def _idle(self) -> bool:
        return self.pending is None or self.pending.done()

    def _complete(self, folder: Path, step: int, later: Callable[[Path], None] | None) -> None:
        try:
            if later is not None:
                later(folder)
            final = checkpoint.complete(folder)
            if self.url is not None:
                # Metrics first: a checkpoint is never ahead of them.
                storage.put_small(self.run_dir, self.url)
                storage.put_checkpoint(final, self.url)
                for older in final.parent.glob("step-*"):  # the storage has them, and this disk may be small
                    if older != final:
                        shutil.rmtree(older)
        except storage.failures() + (SafetensorError,) as error:
            self._miss(step, error)
        else:
            self.missed = None
            self.completed.append(step)

    def _push(self) -> None:
        if self.url is not None:
            try:
                storage.put_small(self.run_dir, self.url)
            except storage.failures() as error:
                self._note(f"metrics are not at {self.url} yet: {error}")

    def _miss(self, step: int, error: BaseException) -> None:
        self.missed = f"the checkpoint of step {step} could not be written to {self.url or self.run_dir}: {error}"
        # It may be what fills the disk, on which metrics are written too.
        shutil.rmtree(checkpoint.unfinished(self.run_dir, step), ignore_errors=True)
        self._note(self.missed)

    def _note(self, message: str) -> None:
        """Unless it is this disk that is full."""
        with suppress(OSError):
            note(self.run_dir, message)
