"""Worker 0's duties after each step: its line of metrics, the guards, an ear for requests to stop, checkpoints."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from craftor import checkpoint, ledger, watch
from craftor.interruption import Listener, Next
from craftor.pictures import save_sheet
from craftor.recipe import Recipe, Tuning
from craftor.run_files import METRICS, MetricsLog, note
from craftor.saver import Saver
from craftor.tasks import Task
from craftor.updates import averaged


class Chief:
    """Enter it for as long as training lasts; leaving waits until the last checkpoint is where it belongs."""

    def __init__(self, recipe: Recipe, run_dir: Path, step: int, stop_request: Any) -> None:
        self.recipe = recipe
        self.log = MetricsLog(run_dir / METRICS, step)
        rules = recipe.guards.rules if isinstance(recipe.task, Tuning) else ()
        self.guard = watch.Watch(rules, run_dir, run_dir / METRICS, step)
        self.ear = Listener(stop_request)
        self.saver = Saver(run_dir, recipe.run.storage)
        self.started = time.perf_counter()

    def __enter__(self) -> "Chief":
        self.saver.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.saver.__exit__(*error)

    def after(self, figures: dict[str, float], images: Tensor | None, slow: list[str]) -> Next:
        """Write down a step's figures, which are complete but for its speed; what all workers are to do next.

        `slow` says which of them have become stragglers.
        """
        for message in slow:
            note(self.saver.run_dir, message)
        now = time.perf_counter()
        record = {**figures, "images_per_second": self.recipe.images_per_step / (now - self.started)}
        self.log.write(record)
        self.started = now
        self.saver.push()
        # Before the checkpoint: a run that goes on from it has heard what there was to say of its steps.
        return max(self.ear.heard(), Next.END if self.guard.ends(record, images) else Next.STEP)

    def save(
        self,
        step: int,
        task: Task,
        optimizer: torch.optim.Optimizer,
        average: dict[str, Tensor] | None,
        samples: str,
    ) -> None:
        """Write a checkpoint, whose pipeline folder holds the averaged weights where an average is kept, and pictures.

        `samples` is the ledger's text.
        """
        if (images := task.pictures()) is not None:
            save_sheet(images, self.saver.run_dir / "samples" / f"step-{step:06d}.png")

        def save_module(folder: Path) -> None:
            with averaged(task.module, average):
                task.save(folder)
            (folder / "trainer" / ledger.FILE).write_text(samples)

        def write(folder: Path) -> None:
            checkpoint.write(
                folder,
                step,
                save_module=save_module,
                module=task.module,
                optimizer=optimizer,
                average=average,
                state={
                    "recipe": self.recipe.model_dump(by_alias=True),
                    "next_position": step * self.recipe.run.batch_size,
                    "task": task.state(),
                },
            )

        self.saver.save(step, write)


def resume(
    run_dir: Path, task: Task, optimizer: torch.optim.Optimizer, average: dict[str, Tensor] | None
) -> tuple[int, str]:
    """Restore the run's newest checkpoint, if it has one; the steps done and the ledger of their samples."""
    last = checkpoint.latest(run_dir)
    if last is None:
        return 0, ""
    step = checkpoint.restore(last, module=task.module, optimizer=optimizer, average=average)
    task.restore(json.loads((last / "trainer" / "state.json").read_text()).get("task", {}))
    path = last / "trainer" / ledger.FILE
    return step, path.read_text() if path.exists() else ""
