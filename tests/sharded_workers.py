"""Workers without Ray for `test_sharding`: processes that each step their share of every batch, in shards or whole."""

import multiprocessing
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor, nn

from craftor import checkpoint, sharded_checkpoint
from craftor.calibrate import PROMPT, sample_rows
from craftor.recipe import load
from craftor.sharding import shard, sum_of_squares, whole
from craftor.stream import Rows, slots
from craftor.tasks import build
from craftor.updates import drift, update_average


class Worker:
    """One process's part in a run; `world_size` 0 holds everything whole."""

    def __init__(self, recipe: Path, overrides: dict, rank: int = 0, world_size: int = 0) -> None:
        self.recipe, self.rank, self.world_size = load(recipe, overrides), rank, world_size
        torch.manual_seed(0)
        self.task = build(self.recipe)
        self.blank = shard(self.task, torch.device("cpu")) if world_size else None
        self.trained = checkpoint.trained(self.task.module)
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=1e-3)
        self.original = {name: p.detach().clone() for name, p in self.trained.items()}
        self.average = {name: p.clone() for name, p in self.original.items()}
        self.norms: list[float] = []

    def train(self, steps: range) -> None:
        size, num = self.recipe.run.batch_size, max(self.world_size, 1)
        for step in steps:
            own = slots(size, self.rank, num)
            rows = batch(self, step, own)
            self.optimizer.zero_grad()
            for part in rows.split(self.recipe.run.micro_batch):
                self.task.step(part, float(len(part.position) * Fraction(num, size)))
            self.norms.append(whole(nn.utils.clip_grad_norm_(self.trained.values(), 1.0)).item())
            self.optimizer.step()
            update_average(self.average, self.task.module, 0.9, step)

    def save(self, run_dir: Path, step: int) -> None:
        """As `chief` does."""
        folder = checkpoint.unfinished(run_dir, step)
        if self.blank is None:
            checkpoint.save(
                run_dir,
                step,
                save_module=self.task.save,
                module=self.task.module,
                optimizer=self.optimizer,
                average=self.average,
                state={},
            )
            return
        if self.rank == 0:
            checkpoint.begin(run_dir, step)
        torch.distributed.barrier()
        sharded_checkpoint.write(folder, self.task.module, self.optimizer, self.average)
        if self.rank == 0:
            self.task.save(folder, sharded_checkpoint.consolidate(folder, self.blank, averaged=True))
            checkpoint.write_state(folder, step, {})
            checkpoint.complete(folder)
        torch.distributed.barrier()

    def restore(self, folder: Path) -> None:
        sharded_checkpoint.restore(folder, self.task.module, self.optimizer, self.average)

    def figures(self) -> dict[str, Tensor]:
        """Everything that a run's end shows, whole."""
        weights = {name: whole(p.detach()).clone() for name, p in self.trained.items()}
        moments = {
            f"{name}/{key}": whole(self.optimizer.state[p][key]).clone()
            for name, p in self.trained.items()
            for key in sharded_checkpoint.MOMENTS
        }
        averages = {f"average/{name}": whole(value).clone() for name, value in self.average.items()}
        moved = {"drift": torch.tensor(drift(self.task.module, self.original)), "norms": torch.tensor(self.norms)}
        return {**weights, **moments, **averages, **moved}


def batch(worker: Worker, step: int, own: range) -> Rows:
    """A worker's slots of a step's batch, of which no two prompts are the same."""
    size = worker.recipe.run.batch_size
    prompts = [f"{PROMPT} {'red' if slot % 2 else 'blue'} {slot}" for slot in range(size)]
    rows = sample_rows(worker.task.diffuser.tokenize(prompts), worker.recipe)
    columns = {name: column[own.start : own.stop] for name, column in rows.columns.items()}
    return Rows([step * size + slot for slot in own], columns)


def together(num: int, function, *arguments) -> None:
    """Call `function(rank, num, *arguments)` in `num` processes that can talk; their imports are made once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sharded_workers", "craftor.tasks.reward_tuning", "craftor.tasks.denoising"])
    processes = [context.Process(target=_member, args=(rank, num, function, arguments)) for rank in range(num)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * num


def _member(rank: int, num: int, function, arguments) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(Path(arguments[0]) / "store"), num)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=num)
    function(rank, num, *arguments)
    torch.distributed.destroy_process_group()


def shard_bytes(module: nn.Module) -> int:
    """Of a module's parameters, what this worker holds."""
    from craftor.sharding import local

    return sum(local(p.detach()).nbytes for p in module.parameters())


__all__ = ["Worker", "shard_bytes", "sum_of_squares", "together"]
