"""The training loop on Ray Train: task-blind, exact under restarts, the same for any number of workers.

The only file that imports `ray.train`. Each worker computes its slice of every global batch and the gradients are
averaged once, after the whole backward pass: a step enters its modules many times and by parts, which hooks that
average during one `backward()` cannot follow. Worker 0 writes metrics (one JSON line a step) and checkpoints into the
run's folder.
"""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, get_device
from torch import Tensor, nn

from craftor import checkpoint, reward_actors, stage, stream, watch
from craftor.pictures import save_sheet
from craftor.probe import Probe
from craftor.recipe import Optimizer, Recipe, Reward, RewardTuning, Tuning
from craftor.reward_actors import RewardFailed
from craftor.run_files import FAILURE, METRICS, MetricsLog, report_failure, report_gradient, write_json
from craftor.tasks import Task, build

__all__ = ["FAILURE", "METRICS", "TrainingStopped", "fit", "train_worker", "write_json"]
BUCKET = 25_000_000


class TrainingStopped(RuntimeError):
    """A number that is not finite, a reward that failed, or a guard; the message says which, checkpoints stand."""


def fit(recipe: Recipe, run_dir: Path, rows: Path | str, num_rows: int, trial: dict[str, Any] | None = None) -> Path:
    """Train until `run.num_steps`, from the run's last checkpoint if it has one; returns the final checkpoint.

    `trial` is what a search's trial has beside its recipe: `probe`, what `Probe` takes; `resources` of each worker; and
    `callbacks`, by which Ray Tune hears of evaluations.

    Raises TrainingStopped when a sample's loss is not finite, when a reward's actors fail, or by a rule of `[guards]`:
    at once where that has happened before.
    """
    (run_dir / FAILURE).unlink(missing_ok=True)
    if watch.ended(run_dir) is None:
        try:
            with reward_actors.running(_rewards(recipe)) as scope:
                _train(recipe, run_dir, rows, num_rows, scope, trial or {})
        except RewardFailed as error:
            raise TrainingStopped(str(error)) from None
    if (run_dir / FAILURE).exists():
        raise TrainingStopped(json.loads((run_dir / FAILURE).read_text())["message"])
    return _final_checkpoint(run_dir)


def _rewards(recipe: Recipe) -> dict[str, Reward]:
    rewards = recipe.task.rewards if isinstance(recipe.task, Tuning) else {}
    return {name: reward for name, reward in rewards.items() if reward.in_training}


def _train(
    recipe: Recipe, run_dir: Path, rows: Path | str, num_rows: int, reward_scope: str, trial: dict[str, Any]
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
            "reward_scope": reward_scope,
            "probe": trial.get("probe"),
        },
        scaling_config=ScalingConfig(
            num_workers=recipe.workers.num, use_gpu=recipe.workers.gpu, resources_per_worker=trial.get("resources")
        ),
        datasets={"rows": stream.read(rows)},
        # Every worker sees the whole ordered stream and takes its slots: see `stream`.
        dataset_config=DataConfig(datasets_to_split=[], execution_options=context.execution_options),
        run_config=RunConfig(
            name="ray",
            storage_path=str((run_dir / "ray").resolve()),
            failure_config=FailureConfig(max_failures=3),
            callbacks=trial.get("callbacks"),
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
    """One Ray Train worker. A reward that fails is written into the run's folder, for `fit` to raise."""
    run_dir = Path(config["run_dir"])
    if (run_dir / FAILURE).exists():
        return  # a reward failed, and Ray Train has started all workers again
    try:
        _steps(config)
    except RewardFailed as error:
        write_json(run_dir / FAILURE, {"message": f"{error}\nThe last checkpoint stands"})
        if ray.train.get_context().get_world_size() > 1:
            raise  # the others wait for this worker's gradient: Ray Train ends them all


def _steps(config: dict[str, Any]) -> None:
    """Restore, then step to the end."""
    recipe = Recipe.model_validate(config["recipe"])
    run_dir, settings = Path(config["run_dir"]), recipe.optimizer
    torch.set_num_threads(recipe.workers.threads)
    torch.manual_seed(recipe.seed)
    torch.use_deterministic_algorithms(True)
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()

    elsewhere = reward_actors.connect(_rewards(recipe), config["reward_scope"], rank)
    device = get_device() if recipe.workers.gpu else torch.device("cpu")
    task = build(recipe, device, elsewhere)
    task.assert_frozen()
    trained = checkpoint.trained(task.module)
    groups = [
        {"params": [p for p in part.parameters() if p.requires_grad], "base_lr": task.rates.get(name) or settings.lr}
        for name, part in task.module.items()
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay)
    original = {name: p.detach().clone() for name, p in trained.items()}
    average = {name: p.clone() for name, p in original.items()} if settings.ema_decay else None
    step = 0
    if (last := checkpoint.latest(run_dir)) is not None:
        step = checkpoint.restore(last, module=task.module, optimizer=optimizer, average=average)
        task.restore(json.loads((last / "trainer" / "state.json").read_text()).get("task", {}))
    log = MetricsLog(run_dir / METRICS, step) if rank == 0 else None
    rules = recipe.guards.rules if isinstance(recipe.task, Tuning) else ()
    guard = watch.Watch(rules, run_dir, run_dir / METRICS, step) if rank == 0 else None
    may_end = any(rule.action != "warn" for rule in rules)
    probe = Probe(config["probe"], recipe, task, run_dir, step, rank) if config["probe"] else None
    shares = open_stream(recipe, config, rank, world_size, step)
    if probe is not None and probe.missed:
        report_scores(probe, step, task, average)
    started = time.perf_counter()
    while step < recipe.run.num_steps:
        rows = next(shares)
        optimizer.zero_grad()
        if task.needs_start:
            task.observe(gather(accumulate(task, rows, recipe.run.micro_batch), world_size))
            optimizer.zero_grad()
        metrics = gather(accumulate(task, rows, recipe.run.micro_batch), world_size)
        if not all(values.isfinite().all() for values in metrics.values()):
            report_failure(run_dir, rows, recipe, metrics, rank)
            return
        figures = task.observe(metrics)
        average_gradients(list(trained.values()), world_size)
        norm = nn.utils.clip_grad_norm_(trained.values(), settings.clip_norm)
        if not norm.isfinite():
            report_gradient(run_dir, step, norm, rank)
            return
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * lr_factor(settings, step, recipe.run.num_steps)
        optimizer.step()
        update_average(average, task.module, settings.ema_decay, step)
        step += 1
        if step == 1:
            task.assert_frozen()
            idle = [name for name, p in trained.items() if p.grad is None]
            assert not idle, f"no gradient reaches {idle}: it would not train"
        ends = False
        if log is not None and guard is not None:
            now = time.perf_counter()
            record = {
                "step": step,
                **figures,
                "grad_norm": norm.item(),
                "lr": optimizer.param_groups[0]["lr"],
                "drift": drift(task.module, original),
                "images_per_second": recipe.run.batch_size / (now - started),
            }
            log.write(record)
            started = now
            # Before the checkpoint: a run that goes on from it has heard what there was to say of its steps.
            ends = guard.ends(record, task.pictures())
            if step % recipe.run.checkpoint_every == 0 or step == recipe.run.num_steps:
                save(recipe, run_dir, step, task, optimizer, average)
        if may_end and agreed(ends, world_size, device):
            return
        if probe is not None and probe.due(step):
            report_scores(probe, step, task, average)


def open_stream(
    recipe: Recipe, config: dict[str, Any], rank: int, world_size: int, start_step: int
) -> Iterator[stream.Rows]:
    """The worker's shares of every batch from `start_step` on."""
    ranks = {"rank": rank, "world_size": world_size, "start_step": start_step}
    if isinstance(recipe.task, RewardTuning) and recipe.task.prefix.mode == "stage":
        return stage.batches(recipe, Path(config["rows"]), num_rows=config["num_rows"], **ranks)
    shard = ray.train.get_dataset_shard("rows")
    return stream.batches(shard, num_rows=config["num_rows"], batch_size=recipe.run.batch_size, **ranks)


def accumulate(task: Task, rows: stream.Rows, micro_batch: int | None) -> dict[str, Tensor]:
    """One worker's share in parts of `micro_batch`; their gradients add up to that of the share's mean loss."""
    parts = [(part, len(part.position) / len(rows.position)) for part in rows.split(micro_batch)]
    metrics = [task.step(part, share) for part, share in parts]
    return {name: torch.cat([m[name] for m in metrics]) for name in metrics[0]}


def average_gradients(parameters: list[nn.Parameter], world_size: int) -> None:
    """Mean of every gradient over the workers, in flat messages of some 100 MB."""
    if world_size == 1:
        return
    bucket: list[Tensor] = []
    for i, parameter in enumerate(parameters):
        assert parameter.grad is not None, "a trained parameter without gradient"
        bucket.append(parameter.grad)
        if sum(gradient.numel() for gradient in bucket) >= BUCKET or i == len(parameters) - 1:
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            torch.distributed.all_reduce(flat)
            mean = (flat / world_size).split([gradient.numel() for gradient in bucket])
            for gradient, part in zip(bucket, mean, strict=True):
                gradient.copy_(part.view_as(gradient))
            bucket = []


def save(
    recipe: Recipe,
    run_dir: Path,
    step: int,
    task: Task,
    optimizer: torch.optim.Optimizer,
    average: dict[str, Tensor] | None,
) -> None:
    """Write a checkpoint whose pipeline folder holds the averaged weights where an average is kept, and pictures."""
    if (images := task.pictures()) is not None:
        save_sheet(images, run_dir / "samples" / f"step-{step:06d}.png")

    def save_module(folder: Path) -> None:
        with averaged(task.module, average):
            task.save(folder)

    checkpoint.save(
        run_dir,
        step,
        save_module=save_module,
        module=task.module,
        optimizer=optimizer,
        average=average,
        state={
            "recipe": recipe.model_dump(by_alias=True),
            "next_position": step * recipe.run.batch_size,
            "task": task.state(),
        },
    )


def report_scores(probe: Probe, step: int, task: Task, average: dict[str, Tensor] | None) -> None:
    """Judge what a checkpoint of this step would hold, and tell whoever listens to Ray Train."""
    with averaged(task.module, average):
        figures = probe.judged(step)
    ray.train.report(figures)


@contextmanager
def averaged(module: nn.Module, average: dict[str, Tensor] | None) -> Iterator[None]:
    """The averaged weights for the time of the block, where an average is kept."""
    current = {name: p.detach().clone() for name, p in checkpoint.trained(module).items()}
    module.load_state_dict(average or current, strict=False)
    try:
        yield
    finally:
        module.load_state_dict(current, strict=False)


def gather(metrics: dict[str, Tensor], world_size: int) -> dict[str, Tensor]:
    """Per-sample metrics of the whole global batch, in the order of its slots, on every worker."""
    if world_size == 1:
        return metrics
    rows = torch.cat([values.reshape(len(values), -1) for values in metrics.values()], dim=1)
    parts = [torch.empty_like(rows) for _ in range(world_size)]
    torch.distributed.all_gather(parts, rows)
    columns = torch.cat(parts).split([values[0].numel() for values in metrics.values()], dim=1)
    return {name: c.reshape(-1, *v.shape[1:]) for (name, v), c in zip(metrics.items(), columns, strict=True)}


def agreed(ends: bool, world_size: int, device: torch.device) -> bool:
    """Worker 0's decision, on every worker."""
    if world_size == 1:
        return ends
    decision = torch.tensor([float(ends)], device=device)
    torch.distributed.broadcast(decision, src=0)
    return bool(decision.item())


def lr_factor(settings: Optimizer, step: int, num_steps: int) -> float:
    """Linear warm-up, constant, then a cosine to zero over what follows `cosine_from`."""
    warmup = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
    done = step / num_steps
    if done <= settings.cosine_from:
        return warmup
    falling = (done - settings.cosine_from) / (1 - settings.cosine_from)
    return warmup * 0.5 * (1 + math.cos(math.pi * falling))


@torch.no_grad()
def update_average(average: dict[str, Tensor] | None, module: nn.Module, decay: float | None, step: int) -> None:
    """Exponential moving average whose decay grows from 0 to `decay`, so that the start is forgotten."""
    if average is None or decay is None:
        return
    weight = 1 - min(decay, (1 + step) / (10 + step))
    for name, parameter in checkpoint.trained(module).items():
        average[name].lerp_(parameter, weight)


@torch.no_grad()
def drift(module: nn.Module, original: dict[str, Tensor]) -> float:
    """Relative distance of the weights from where they started."""
    moved = sum((p - original[name]).square().sum().item() for name, p in checkpoint.trained(module).items())
    size = sum(value.square().sum().item() for value in original.values())
    return math.sqrt(moved / size)
