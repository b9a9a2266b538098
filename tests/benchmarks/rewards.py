"""`make bench-rewards`: what it costs a training step that its rewards are Ray actors instead of part of the trainer.

The shipped micro model's step with its recipe's rewards, in turn inline and on actors, in one process; the same for the
scoring of a batch alone. Actors have processes of their own: the processor's clock, which is this process's, shows what
the trainer is relieved of, and the wall's what a user waits for, on as many cores as the machine has.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from rich.console import Console
from torch import Tensor
from transformers.utils import logging

from benchmarks import harness
from craftor.cluster import ray_session
from craftor.locate import locate, shipped_recipe
from craftor.recipe import Recipe, RewardTuning, load
from craftor.reward_actors import connect, running, to_array
from craftor.scoring import ScoreAndGradient
from craftor.stream import Rows
from craftor.tasks.reward_tuning import RewardTuningTask

RECIPE = "micro_textcraftor.toml"
ORDINARY_STEP = 1
"""Step 0 and every tenth also measure the rewards' sharpness."""
TOLERANCE = 1e-5
"""Of gradients, relative to the largest value."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch-size", type=int, default=12, help="a worker's share in the recipe is 12")
    parser.add_argument("--replicas", type=int, default=1, help="of each reward")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    arguments = parser.parse_args()
    started = time.perf_counter()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    console = Console(width=120)

    path = shipped_recipe(RECIPE)
    inline_recipe = load(path)
    assert isinstance(inline_recipe.task, RewardTuning)
    trained = [name for name, reward in inline_recipe.task.rewards.items() if not reward.evaluation_only]
    placed = {f"task.rewards.{name}.placement": "actors" for name in trained}
    placed |= {f"task.rewards.{name}.replicas": arguments.replicas for name in trained}
    recipe = load(path, placed)
    assert isinstance(recipe.task, RewardTuning)
    with ray_session(recipe.num_processes), running(recipe.task.rewards) as scope:
        elsewhere = connect(recipe.task.rewards, scope)
        tasks = {"inline": RewardTuningTask(inline_recipe), "actors": RewardTuningTask(recipe, "cpu", elsewhere)}
        rows = one_batch(tasks["inline"], inline_recipe, arguments.batch_size)
        prompts = [str(prompt) for prompt in rows.columns["prompt"]]
        tasks["inline"].step(rows)
        images = tasks["inline"].pictures()
        assert images is not None
        calls = {where: task.scoring.calls for where, task in tasks.items()}
        errors, moved = compare(calls["inline"], calls["actors"], images, prompts)
        steps: dict[str, Callable[[], object]] = {
            f"step, {where}": stepping(task, rows) for where, task in tasks.items()
        }
        scoring: dict[str, Callable[[], object]] = {
            f"scoring, {where}": scoring_alone(task, images, prompts) for where, task in tasks.items()
        }
        times = harness.in_turn(steps | scoring, rounds=arguments.rounds, warmup=arguments.warmup)

    title = (
        f"micro, batch {arguments.batch_size}, rewards {', '.join(trained)}, {arguments.replicas} replica(s) of each"
    )
    console.print(harness.table(title, times, images=arguments.batch_size))
    figures = {
        "gradient_error_actors": max(errors.values()),
        "step_seconds_inline": float(np.median(times["step, inline"].wall)),
        "step_seconds_actors": float(np.median(times["step, actors"].wall)),
        "bytes_per_image": moved,
    }
    details = {
        "settings": vars(arguments) | {"rewards": trained, "image_shape": list(images.shape[1:])},
        "gradient_error": errors,
        "bytes_per_image": "sent and received for each reward: image, its cotangent, its score and its gradient",
        "variants": {name: own.summary() for name, own in times.items()},
        "actors_over_inline": {
            what: harness.ratio(times[f"{what}, actors"], times[f"{what}, inline"]) for what in ("step", "scoring")
        },
    }
    for key, value in figures.items():
        console.print(f"{key:32s} {value:.4g}", highlight=False)
    console.print(harness.write("rewards", figures=figures, details=details, started=started))


def one_batch(task: RewardTuningTask, recipe: Recipe, size: int) -> Rows:
    """The first prompts of the recipe's file, as a training worker reads them in a step that measures nothing extra."""
    prompts = Path(locate(recipe.data.path)).read_text(encoding="utf-8").splitlines()[:size]
    ids = task.diffuser.tokenize(prompts)["text_encoder"].numpy()
    first = recipe.run.batch_size * ORDINARY_STEP
    return Rows(list(range(first, first + size)), {"input_ids": ids, "prompt": np.array(prompts, dtype=object)})


def compare(
    inline: Mapping[str, ScoreAndGradient],
    actors: Mapping[str, ScoreAndGradient],
    images: Float[Tensor, "b 3 H W"],
    prompts: list[str],
) -> tuple[dict[str, float], float]:
    """Largest difference of a reward's gradients over the largest value, by reward; bytes moved per image and reward.

    Raises RuntimeError where the actors' gradients are others.
    """
    errors, moved, ones = {}, 0.0, torch.ones(len(images))
    for name in inline:
        _, expected = inline[name](images, prompts, ones)()
        scores, gradient = actors[name](images, prompts, ones)()
        assert expected is not None and gradient is not None
        errors[name] = ((gradient - expected).abs().max() / expected.abs().max()).item()
        moved += sum(to_array(tensor).nbytes for tensor in (images, ones, scores, gradient)) / len(images)
        if not errors[name] <= TOLERANCE:
            raise RuntimeError(f"reward '{name}': gradients differ by {errors[name]:.1e}; allowed: {TOLERANCE}")
    return errors, moved / len(errors)


def stepping(task: RewardTuningTask, rows: Rows) -> Callable[[], None]:
    """Forward and backward of one batch, into gradients that begin at nothing."""

    def step() -> None:
        task.module.zero_grad()
        task.step(rows)

    return step


def scoring_alone(task: RewardTuningTask, images: Tensor, prompts: list[str]) -> Callable[[], object]:
    return lambda: task.scoring(images, prompts, 1.0, ORDINARY_STEP)


if __name__ == "__main__":
    main()
