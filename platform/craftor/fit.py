"""Training as one Ray Train job, seen from the driver: workers, failures and what ends a run.

Only this file and `worker` import `ray.train`.
"""

import json
from pathlib import Path
from typing import Any

import ray.data
from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer

from craftor import checkpoint, interruption, remote, reward_actors, storage, stream, validation, watch
from craftor.interruption import Interrupted
from craftor.recipe import Recipe
from craftor.reward_actors import RewardFailed
from craftor.run_files import FAILURE
from craftor.worker import TrainingStopped, rewards_of

__all__ = ["TrainingStopped", "fit"]


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
                reward_actors.running(rewards_of(recipe)) as scope,
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
    return _final_checkpoint(run_dir, url)


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
        remote.train,
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


def _final_checkpoint(run_dir: Path, url: str | None) -> Path:
    """The newest, but for what a guard has to say. `url` is `run.storage`."""
    for said in watch.read(run_dir):
        print(f"guard, step {said['step']}: {said['reason']} ({said['action']}); see {run_dir / str(said['pictures'])}")
    ended = watch.ended(run_dir)
    if ended is not None and ended["action"] == "stop":
        homes = [str(run_dir)] if url is None else [url, str(run_dir)]  # resuming takes what the folder still has, too
        raise TrainingStopped(
            f"a guard stopped the run at step {ended['step']}: {ended['reason']}; its checkpoints stand. To train on, "
            f"change [guards] in {homes[0]}/recipe.toml, remove {' and '.join(f'{h}/{watch.GUARD}' for h in homes)}, "
            "and resume"
        )
    if ended is not None and url is not None:
        # The folder mirrors the newest one alone, which is most likely to be discarded.
        storage.discard_after(url, ended["last_good_step"])
        storage.get_latest(url, run_dir)
    final = checkpoint.latest(run_dir) if ended is None else watch.roll_back(run_dir, ended["last_good_step"])
    if final is None:
        assert ended is not None, "training ended without a checkpoint"
        raise TrainingStopped(
            f"a guard rolled the run back at step {ended['step']}: {ended['reason']}; there is no checkpoint of step "
            f"{ended['last_good_step']} or before; allowed: a smaller run.checkpoint_every"
        )
    return final
