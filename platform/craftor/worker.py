"""A worker's loop: slice of the batch, gradient, average, optimiser step, checkpoint; exact under restarts.

Task-blind, and the same for any number of workers: each computes its slice of every global batch and the gradients are
averaged once, after the whole backward pass: a step enters its modules many times and by parts, which hooks that
average during one `backward()` cannot follow. Where workers hold shards (`sharding`), every pass adds its own average.
Worker 0 writes metrics (one JSON line a step) and checkpoints into the run's folder.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray.train
import torch
from ray.train.torch import get_device
from torch import Tensor, nn

from craftor import (
    checkpoint,
    chief,
    interruption,
    ledger,
    reward_actors,
    sharding,
    stage,
    storage,
    straggler,
    stream,
    validation,
)
from craftor.allocation import keep_freed_memory
from craftor.collective import agreed, average_gradients, first_says, gather
from craftor.determinism import prefer_deterministic
from craftor.interruption import Next
from craftor.precision import NAMES, multiplies_bf16
from craftor.recipe import Recipe, Reward, RewardTuning, Tuning
from craftor.reward_actors import RewardFailed
from craftor.run_files import FAILURE, note, report_failure, report_gradient, write_json
from craftor.saver import CheckpointMissed
from craftor.searching.probe import Probe
from craftor.tasks import Task, build
from craftor.updates import averaged, drift, lr_factor, update_average


class TrainingStopped(RuntimeError):
    """A number that is not finite, a reward that failed, or a guard; the message says which, checkpoints stand."""


class PrecisionsDiffer(RuntimeError):
    """Workers whose devices have chosen differently: their gradients would be those of different functions."""


def train_worker(config: dict[str, Any]) -> None:
    """One Ray Train worker. What cannot be mended by starting again is written down, for `fit` to raise."""
    with _folder(config) as run_dir:
        if (run_dir / FAILURE).exists():
            return  # Ray Train has started all workers again
        try:
            _steps(config, run_dir)
        except (RewardFailed, CheckpointMissed, PrecisionsDiffer) as error:
            write_json(run_dir / FAILURE, {"message": f"{error}\nThe last checkpoint stands"})
            if ray.train.get_context().get_world_size() > 1:
                raise  # the others wait for this worker's gradient: Ray Train ends them all
        finally:
            if (url := config["recipe"]["run"]["storage"]) is not None and (run_dir / FAILURE).exists():
                tell(run_dir / FAILURE, url)


def tell(failure: Path, url: str) -> None:
    """Put what ended a run where the driver looks for it. Raises TrainingStopped where that takes nothing any more."""
    try:
        storage.put(failure, f"{url}/{FAILURE}")
    except storage.failures():
        raise TrainingStopped(json.loads(failure.read_text())["message"]) from None


@contextmanager
def _folder(config: dict[str, Any]) -> Iterator[Path]:
    """The run's own, or where its home is a URL, a folder of this worker's with what it goes on from."""
    if (url := config["recipe"]["run"]["storage"]) is None:
        yield Path(config["run_dir"])
        return
    with TemporaryDirectory(prefix="craftor-") as folder:
        storage.get_small(url, Path(folder))
        storage.get_latest(url, Path(folder))
        yield Path(folder)


def _steps(config: dict[str, Any], run_dir: Path) -> None:
    """Restore, then step to the end."""
    recipe = Recipe.model_validate(config["recipe"])
    settings = recipe.optimizer
    torch.set_num_threads(recipe.workers.threads)
    torch.manual_seed(recipe.seed)
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()

    elsewhere = reward_actors.connect(rewards_of(recipe), config["reward_scope"], rank)
    device = get_device() if recipe.workers.gpu else torch.device("cpu")
    prefer_deterministic(device)
    task = build(recipe, device, elsewhere)
    task.assert_frozen()
    check_precision(task.diffuser.precision, device, run_dir, rank, world_size)
    keep_freed_memory()
    blank = sharding.shard(task, device) if recipe.workers.strategy == "fsdp" else None
    trained = checkpoint.trained(task.module)
    groups = [
        {"params": [p for p in part.parameters() if p.requires_grad], "base_lr": task.rates.get(name) or settings.lr}
        for name, part in task.module.items()
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay)
    original = {name: p.detach().clone() for name, p in trained.items()}
    average = {name: p.clone() for name, p in original.items()} if settings.ema_decay else None
    step, past = chief.resume(run_dir, task, optimizer, average)
    pace = straggler.Watch(rank, world_size)
    preemptions = interruption.Preemptions()
    slots = [len(stream.slots(recipe.run.batch_size, r, world_size)) for r in range(world_size)]
    book = ledger.Ledger(recipe, config["num_rows"], slots, past)
    # What one sample of this worker counts, so that the mean over workers is the mean over the batch.
    weight = Fraction(world_size, recipe.run.batch_size)
    shares = open_stream(recipe, config, rank, world_size, step)
    probe = Probe(config["probe"], recipe, task, run_dir, step, rank) if config["probe"] else None
    if probe is not None and probe.missed:
        report_scores(probe, step, task, average)
    then = Next.STEP
    with chief.Chief(recipe, run_dir, step, config["stop_request"]) if rank == 0 else nullcontext() as lead:
        while step < recipe.run.num_steps:
            rows = next(shares)
            optimizer.zero_grad()
            if task.needs_start:
                task.observe(gather(accumulate(task, rows, recipe.run.micro_batch, weight), slots))
                optimizer.zero_grad()
            begun = time.perf_counter()
            own = accumulate(task, rows, recipe.run.micro_batch, weight)
            slow = pace.after(begun)
            metrics = gather(own, slots)
            if not all(values.isfinite().all() for values in metrics.values()):
                report_failure(run_dir, rows, recipe, metrics)
                return
            figures = task.observe(metrics)
            if blank is None:
                average_gradients(list(trained.values()), world_size)
            norm = sharding.whole(nn.utils.clip_grad_norm_(trained.values(), settings.clip_norm))
            if not norm.isfinite():
                report_gradient(run_dir, step, norm, rank)
                return
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * lr_factor(settings, step, recipe.run.num_steps)
            optimizer.step()
            update_average(average, task.module, settings.ema_decay, step)
            step += 1
            book.note(rows.position)
            if step == 1:
                task.assert_frozen()
                idle = [name for name, p in trained.items() if p.grad is None]
                assert not idle, f"no gradient reaches {idle}: it would not train"
            then = Next.STEP
            # Of shards, all workers measure it together; of whole parts, the one that tells it.
            moved = drift(task.module, original) if lead is not None or blank is not None else 0.0
            if lead is not None:
                lr = optimizer.param_groups[0]["lr"]
                figures = {"step": step, **figures, "grad_norm": norm.item(), "lr": lr, "drift": moved}
                then = lead.after(figures, task.pictures(), slow)
            then = agreed(then, world_size)
            leaves = preemptions.new() if then == Next.ASK else []
            due = step % recipe.run.checkpoint_every == 0 or step == recipe.run.num_steps
            if due or leaves or then == Next.SAVE_AND_END:
                samples = book.close(step, device)
                if blank is not None:
                    home = recipe.run.storage
                    chief.save_shards(lead, run_dir, home, step, task, optimizer, average, samples, blank)
                elif lead is not None:
                    lead.save(step, task, optimizer, average, samples)
                if lead is not None and leaves:
                    lead.saver.wait()
                    note(run_dir, f"notice that a node will go ({', '.join(leaves)}): step {step} is saved")
            if then == Next.REPORT:
                report_checkpoint(lead)
            if then >= Next.SAVE_AND_END:
                break
            if probe is not None and probe.due(step):
                report_scores(probe, step, task, average)
        if recipe.validation is not None and then != Next.SAVE_AND_END:
            if lead is not None:
                lead.saver.wait()
            while first_says(lead is not None and lead.to_validate, world_size):
                report_checkpoint(lead)


def check_precision(own: torch.dtype, device: torch.device, run_dir: Path, rank: int, world_size: int) -> None:
    """Note where the device emulates it. Raises PrecisionsDiffer where it is not worker 0's."""
    first = list(NAMES)[first_says(list(NAMES).index(own), world_size)]
    if own != first:
        raise PrecisionsDiffer(
            f"model.precision = \"auto\": a worker's device computes in {NAMES[own]}, worker 0's in {NAMES[first]}; "
            'allowed: "fp32" or "bf16" for both, or workers on devices of one kind'
        )
    if rank == 0 and own == torch.bfloat16 and not multiplies_bf16(device):
        note(run_dir, 'model.precision = "bf16" is emulated by this device; "auto" or "fp32" is many times faster')


def report_checkpoint(lead: chief.Chief | None) -> None:
    """Hand the oldest complete checkpoint that is to be validated to Ray Train; all workers call it together."""
    validation.report(lead.saver.completed.pop(0) if lead is not None else None)


def open_stream(
    recipe: Recipe, config: dict[str, Any], rank: int, world_size: int, start_step: int
) -> Iterator[stream.Rows]:
    """The worker's shares of every batch from `start_step` on."""
    ranks = {"rank": rank, "world_size": world_size, "start_step": start_step}
    if isinstance(recipe.task, RewardTuning) and recipe.task.prefix.mode == "stage":
        return stage.batches(recipe, config["rows"], num_rows=config["num_rows"], **ranks)
    shard = ray.train.get_dataset_shard("rows")
    return stream.batches(shard, num_rows=config["num_rows"], batch_size=recipe.run.batch_size, **ranks)


def report_scores(probe: Probe, step: int, task: Task, average: dict[str, Tensor] | None) -> None:
    """Judge what a checkpoint of this step would hold, and tell whoever listens to Ray Train."""
    with averaged(task.module, average):
        figures = probe.judged(step)
    ray.train.report(figures)


def accumulate(task: Task, rows: stream.Rows, micro_batch: int | None, weight: Fraction) -> dict[str, Tensor]:
    """One worker's share in parts of `micro_batch`; their gradients add up to `weight` times the sum of its losses."""
    metrics = [task.step(part, float(len(part.position) * weight)) for part in rows.split(micro_batch)]
    return {name: torch.cat([m[name] for m in metrics]) for name in metrics[0]}


def rewards_of(recipe: Recipe) -> dict[str, Reward]:
    """Those that are asked in training."""
    rewards = recipe.task.rewards if isinstance(recipe.task, Tuning) else {}
    return {name: reward for name, reward in rewards.items() if reward.in_training}
