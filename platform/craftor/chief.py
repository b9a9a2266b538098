"""Worker 0's duties after each step: its line of metrics, the guards, an ear for requests to stop, checkpoints."""

import json
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from craftor import checkpoint, ledger, sharded_checkpoint, watch
from craftor.collective import first_says
from craftor.interruption import Listener, Next
from craftor.pictures import save_sheet
from craftor.recipe import Recipe, Tuning
from craftor.run_files import METRICS, VALIDATIONS, MetricsLog, note
from craftor.saver import Saver
from craftor.sharded_checkpoint import SHARDS
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
        if step > 0 and not (run_dir / VALIDATIONS / f"{checkpoint.folder_name(step)}.json").exists():
            self.saver.completed.append(step)
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
        ended = Next.END if self.guard.ends(record, images) else Next.STEP
        return max(self.ear.heard(), ended, Next.REPORT if self.to_validate else Next.STEP)

    @property
    def to_validate(self) -> bool:
        """Whether a checkpoint is complete that is to be validated."""
        return self.recipe.validation is not None and bool(self.saver.completed)

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
        self.save_sheet(step, task)

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
                state=self.state(step, task),
            )

        self.saver.save(step, write)

    def save_sheet(self, step: int, task: Task) -> None:
        if (images := task.pictures()) is not None:
            save_sheet(images, self.saver.run_dir / "samples" / f"step-{step:06d}.png")

    def state(self, step: int, task: Task) -> dict[str, Any]:
        return {
            "recipe": self.recipe.model_dump(by_alias=True),
            "next_position": step * self.recipe.run.batch_size,
            "task": task.state(),
        }


def save_shards(
    lead: Chief | None,
    run_dir: Path,
    home: str | None,
    step: int,
    task: Task,
    optimizer: torch.optim.Optimizer,
    average: dict[str, Tensor] | None,
    samples: str,
    blank: nn.ModuleDict,
) -> None:
    """Write a checkpoint of what is sharded; all workers call it together, worker 0 with its `lead`.

    Its pipeline folder is made of the shards' files by worker 0, while training goes on. Where the run's home is a URL,
    the others' shards come to worker 0 over it.
    """
    url = f"{home}/checkpoints/{checkpoint.folder_name(step)}" if home is not None else None
    prepare = partial(sharded_checkpoint.clear, url) if url is not None else None
    begun = lead is None or lead.saver.begin(step, prepare) is not None
    if not first_says(begun, torch.distributed.get_world_size()):
        return

    def write_shards(folder: Path) -> None:
        sharded_checkpoint.write(folder, task.module, optimizer, average)
        if url is not None:
            sharded_checkpoint.hand_over(folder, url)

    folder = checkpoint.unfinished(run_dir, step)
    if lead is None:
        with suppress(OSError):  # worker 0 has it too, and notes it
            write_shards(folder)
        return
    lead.save_sheet(step, task)
    state = lead.state(step, task)

    def write(folder: Path) -> None:
        write_shards(folder)
        (folder / "trainer" / ledger.FILE).write_text(samples)
        checkpoint.write_state(folder, step, state)

    def consolidate(folder: Path) -> None:
        if url is not None:
            sharded_checkpoint.fetch(folder, url)
        task.save(folder, sharded_checkpoint.consolidate(folder, blank, averaged=average is not None))

    lead.saver.end(folder, step, write, consolidate)


def resume(
    run_dir: Path, task: Task, optimizer: torch.optim.Optimizer, average: dict[str, Tensor] | None
) -> tuple[int, str]:
    """Restore the run's newest checkpoint, if it has one; the steps done and the ledger of their samples."""
    last = checkpoint.latest(run_dir)
    if last is None:
        return 0, ""
    sharded = any(isinstance(parameter, DTensor) for parameter in task.module.parameters())
    if sharded or (last / "trainer" / SHARDS).is_dir():
        step = sharded_checkpoint.restore(last, task.module, optimizer, average)
    else:
        step = checkpoint.restore(last, module=task.module, optimizer=optimizer, average=average)
    task.restore(json.loads((last / "trainer" / "state.json").read_text()).get("task", {}))
    path = last / "trainer" / ledger.FILE
    return step, path.read_text() if path.exists() else ""
