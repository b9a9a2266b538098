"""Workers without Ray for `test_sharding`: processes that each step their share of every batch, in shards or whole."""

import multiprocessing
from contextlib import nullcontext
from fractions import Fraction
from multiprocessing import connection
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from craftor import checkpoint, sharded_checkpoint
from craftor.calibrate import PROMPT, sample_rows
from craftor.chief import Chief, save_shards
from craftor.interruption import Sigterm
from craftor.recipe import load
from craftor.sharding import local, shard, whole
from craftor.stream import Rows, slots
from craftor.tasks import build
from craftor.updates import drift, update_average

CASES = {
    "both": {
        "task.train.unet.method": "full",
        "task.train.text_encoder.method": "full",
        "task.window": {"start": 1, "stop": 3, "recompute": 1},
        "run.micro_batch": 1,
    },
    "xl": {
        "model.path": "sdxl",
        "task.train.text_encoder.method": "full",
        "task.train.text_encoder_2.method": "full",
        "task.train.unet.method": "lora",
        "model.gradient_checkpointing": True,
    },
    "policy": {"task.kind": "policy_gradient", "task.window": {"last": 2}, "task.train.unet.method": "full"},
}
BATCH = {"run.batch_size": 8, "workers.num": 4, "workers.strategy": "fsdp"}


def recipes(root: Path) -> dict[str, dict]:
    found = {name: {**BATCH, **case} for name, case in CASES.items()}
    found["xl"]["model.path"] = str(root / "sdxl")
    return found


class Worker:
    """One process's part in a run; `world_size` 0 holds everything whole."""

    def __init__(self, recipe: Path, overrides: dict, rank: int = 0, world_size: int = 0) -> None:
        self.recipe, self.rank, self.world_size = load(recipe, overrides), rank, world_size
        torch.manual_seed(0)
        self.task = build(self.recipe)
        self.blank = shard(self.task, torch.device("cpu")) if world_size else None
        self.trained = checkpoint.trained(self.task.module)
        # Adam divides a gradient by its own size, rounding errors too where there is none: steps are to be small.
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=1e-4)
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

    def save(self, run_dir: Path, step: int, home: str | None = None) -> None:
        """As `fit` does."""
        run_dir.mkdir(exist_ok=True)
        state = (step, self.task, self.optimizer, self.average, "")
        recipe = self.recipe.model_copy(update={"run": self.recipe.run.model_copy(update={"storage": home})})
        with Chief(recipe, run_dir, 0, Sigterm()) if self.rank == 0 else nullcontext() as lead:
            if self.blank is not None:
                save_shards(lead, run_dir, home, *state, self.blank)
            else:
                assert lead is not None
                lead.save(*state)
        if self.world_size:
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
    alive = processes
    while alive:
        connection.wait([process.sentinel for process in alive])
        alive = [process for process in alive if process.is_alive()]
        if any(process.exitcode for process in processes):
            for process in alive:  # they wait for the one that has failed
                process.kill()
    assert [process.exitcode for process in processes] == [0] * num


def _member(rank: int, num: int, function, arguments) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(Path(arguments[0]) / "store"), num)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=num)
    function(rank, num, *arguments)
    torch.distributed.destroy_process_group()


def member(rank: int, num: int, folder: str, recipe: str, root: str) -> None:
    """Every case: a step, a checkpoint, another step; and "both" once more from a whole model's checkpoint."""
    for name, overrides in recipes(Path(root)).items():
        worker = Worker(Path(recipe), overrides, rank, num)
        held = shard_bytes(worker.task.module), shard_bytes(worker.task.diffuser.unet)
        worker.train(range(1))
        worker.save(Path(folder) / name, 1)
        if name == "both":
            worker.save(Path(folder) / f"node-{rank}", 1, f"file://{folder}/away")
        worker.train(range(1, 2))
        worker.task.assert_frozen()
        _note(rank, Path(folder) / f"{name}.safetensors", worker, held)
    worker = Worker(Path(recipe), recipes(Path(root))["both"], rank, num)
    worker.restore(Path(folder) / "whole" / "checkpoints" / "step-000001")
    worker.train(range(1, 2))
    _note(rank, Path(folder) / "from_whole.safetensors", worker, (0, 0))


def _note(rank: int, path: Path, worker: Worker, held: tuple[int, int]) -> None:
    figures = {**worker.figures(), "held": torch.tensor(held)}
    if rank == 0:
        save_file({name: value.contiguous() for name, value in figures.items()}, path)


def shard_bytes(module: nn.Module) -> int:
    """Of a module's parameters, what this worker holds."""
    return sum(local(p.detach()).nbytes for p in module.parameters())
