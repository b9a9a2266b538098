"""The training loop on Ray Train: task-blind, exact under restarts, the same for any number of workers.

The only file that imports `ray.train`. Each worker computes its slice of every global batch and the gradients are
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

import ray
import ray.train
import torch
from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer, get_device
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
    watch,
)
from craftor.collective import agreed, average_gradients, first_says, gather
from craftor.interruption import Interrupted, Next
from craftor.recipe import Recipe, Reward, RewardTuning, Tuning
from craftor.reward_actors import RewardFailed
from craftor.run_files import FAILURE, METRICS, note, report_failure, report_gradient, write_json
from craftor.saver import CheckpointMissed
from craftor.searching.probe import Probe
from craftor.tasks import Task, build
from craftor.updates import averaged, drift, lr_factor, update_average

__all__ = ["FAILURE", "METRICS", "TrainingStopped", "fit", "train_worker", "write_json"]


class TrainingStopped(RuntimeError):
    """A number that is not finite, a reward that failed, or a guard; the message says which, checkpoints stand."""


def fit(recipe: Recipe, run_dir: Path, rows: Path | str, num_rows: int, trial: dict[str, Any] | None = None) -> Path:
    """Train until `run.num_steps`, from the run's last checkpoint if it has one; returns the final checkpoint.

    `trial` is what a search's trial has beside its recipe: `probe`, what `Probe` takes; `resources` of each worker; and
    `callbacks`, by which Ray Tune hears of evaluations.

    Raises TrainingStopped when a sample's loss is not finite, when a reward's actors fail, or by a rule of `[guards]`:
    at once where that has happened before.
    """
    url = recipe.run.storage
    (run_dir / FAILURE).unlink(missing_ok=True)
    if url is not None:
        storage.remove(f"{url}/{FAILURE}")
    if watch.ended(run_dir) is None:
        try:
            with (
                reward_actors.running(_rewards(recipe)) as scope,
                interruption.heeding_sigterm(recipe.workers.processes) as (request, sigterm),
                storage.mirrored(url, run_dir),
            ):
                _train(recipe, run_dir, rows, num_rows, {"reward_scope": scope, "stop_request": request}, trial or {})
        except RewardFailed as error:
            raise TrainingStopped(str(error)) from None
        except TrainingFailedError:
            if not (run_dir / FAILURE).exists():
                raise
        if not (run_dir / FAILURE).exists():
            _raise_if_unfinished(recipe, run_dir, sigterm.came)
    if (run_dir / FAILURE).exists():
        raise TrainingStopped(json.loads((run_dir / FAILURE).read_text())["message"])
    return _final_checkpoint(run_dir)


def _rewards(recipe: Recipe) -> dict[str, Reward]:
    rewards = recipe.task.rewards if isinstance(recipe.task, Tuning) else {}
    return {name: reward for name, reward in rewards.items() if reward.in_training}


def _raise_if_unfinished(recipe: Recipe, run_dir: Path, asked: bool) -> None:
    last = checkpoint.latest(run_dir)
    step = 0 if last is None else checkpoint.step_of(last)
    if step < recipe.run.num_steps and watch.ended(run_dir) is None:
        saved = f"step {step} of {recipe.run.num_steps} is saved. Go on with: "
        again = f"craftor train --resume {recipe.run.storage or run_dir}"
        if asked:
            raise Interrupted(f"stopped by SIGTERM; {saved}{again}")
        raise TrainingStopped(f"the workers ended though nobody had asked them to; {saved}{again}")


def _train(
    recipe: Recipe, run_dir: Path, rows: Path | str, num_rows: int, handles: dict[str, Any], trial: dict[str, Any]
) -> None:
    """The workers' loop, again from the last checkpoint where a worker dies."""
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    TorchTrainer(
        train_worker,
        train_loop_config={
            "recipe": recipe.model_dump(by_alias=True),
            "run_dir": str(run_dir.resolve()),
            "rows": str(rows.resolve()) if isinstance(rows, Path) else rows,
            "num_rows": num_rows,
            "probe": trial.get("probe"),
            **handles,
        },
        scaling_config=ScalingConfig(
            num_workers=recipe.workers.num,
            use_gpu=recipe.workers.gpu,
            resources_per_worker=trial.get("resources"),
            elastic_resize_monitor_interval_s=recipe.workers.resize_s,
        ),
        datasets={"rows": stream.read(rows)},
        validation_config=validation.config(recipe, run_dir),
        # Every worker sees the whole ordered stream and takes its slots: see `stream`.
        dataset_config=DataConfig(datasets_to_split=[], execution_options=context.execution_options),
        run_config=RunConfig(
            name="ray",
            failure_config=FailureConfig(max_failures=3),
            callbacks=trial.get("callbacks"),
            **storage.for_ray(run_dir, recipe),
        ),
    ).fit()


def _final_checkpoint(run_dir: Path) -> Path:
    """The newest, but for what a guard has to say."""
    for said in watch.read(run_dir):
        print(f"guard, step {said['step']}: {said['reason']} ({said['action']}); see {run_dir / str(said['pictures'])}")
    ended = watch.ended(run_dir)
    if ended is not None and ended["action"] == "stop":
        raise TrainingStopped(
            f"a guard stopped the run at step {ended['step']}: {ended['reason']}; its checkpoints stand. To train on, "
            f"change [guards] in {run_dir / 'recipe.toml'}, remove {run_dir / watch.GUARD} and resume"
        )
    final = checkpoint.latest(run_dir) if ended is None else watch.roll_back(run_dir, ended["last_good_step"])
    if final is None:
        assert ended is not None, "training ended without a checkpoint"
        raise TrainingStopped(
            f"a guard rolled the run back at step {ended['step']}: {ended['reason']}; there is no checkpoint of step "
            f"{ended['last_good_step']} or before; allowed: a smaller run.checkpoint_every"
        )
    return final


def train_worker(config: dict[str, Any]) -> None:
    """One Ray Train worker. What cannot be mended by starting again is written down, for `fit` to raise."""
    with _folder(config) as run_dir:
        if (run_dir / FAILURE).exists():
            return  # Ray Train has started all workers again
        try:
            _steps(config, run_dir)
        except (RewardFailed, CheckpointMissed) as error:
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
    torch.use_deterministic_algorithms(True)
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()

    elsewhere = reward_actors.connect(_rewards(recipe), config["reward_scope"], rank)
    device = get_device() if recipe.workers.gpu else torch.device("cpu")
    task = build(recipe, device, elsewhere)
    task.assert_frozen()
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
