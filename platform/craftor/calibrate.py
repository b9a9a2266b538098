"""This machine's speed and memory, from ten seconds of a recipe's own step -> its run on CPU workers."""

import os
import time
from statistics import median

import numpy as np
import psutil
import torch

from craftor.allocation import keep_freed_memory
from craftor.estimate import Prediction, Work, count
from craftor.flops import counting
from craftor.memory import own_peak_memory
from craftor.recipe import Recipe, Tuning
from craftor.stream import IDS, Rows
from craftor.tasks import build

SECONDS = 10.0
SAMPLES = 4
PROMPT = "a picture of something"


def predict(recipe: Recipe, work: Work) -> Prediction:
    """A run of CPU workers on this machine, which share its cores.

    A few samples' step is timed and its operations counted; a worker's share of a batch takes as many more as it has
    more samples. So with memory: the peak of that step, and what it had more than a step of half the samples.
    Rewards on actors are computed in the step: their workers wait for them, and they share this machine.
    """
    if (inline := rewards_inline(recipe)) != recipe:
        recipe, work = inline, count(inline)
    torch.set_num_threads(recipe.workers.threads)
    task = build(recipe)
    keep_freed_memory()
    share = -(-recipe.run.batch_size // recipe.workers.most)
    at_once = min(share, recipe.run.micro_batch or share)
    rows = sample_rows(task.diffuser.tokenize([PROMPT] * min(at_once, SAMPLES)), recipe)
    size = len(rows.position)
    half = max(1, size // 2)
    with own_peak_memory() as smaller:
        task.step(next(rows.split(half)))
    with own_peak_memory() as larger:
        task.step(rows)
    each = max(0.0, larger.gib - smaller.gib) / (size - half) if size > half else 0.0
    with counting() as counter:
        task.step(rows)
    flops = counter.get_total_flops() / size
    times: list[float] = []
    deadline = time.perf_counter() + SECONDS
    while time.perf_counter() < deadline or len(times) < 2:
        begun = time.perf_counter()
        task.step(rows)
        times.append(time.perf_counter() - begun)
    crowded = max(1.0, recipe.workers.most * recipe.workers.threads / len(os.sched_getaffinity(0)))
    rate = size * flops / median(times) / crowded
    step = share * flops / rate
    elsewhere = work.shared_bytes * (1 - 1 / recipe.workers.most)
    # What trains has its gradient already; its two moments and where it began come with the first update.
    memory = larger.gib + (at_once - size) * each + (3 * 4.0 * work.trained - elsewhere) / 2**30
    total = sum(work.flops.values())
    seconds = {name: step * own / total for name, own in work.flops.items()}
    return Prediction(
        memory,
        memory * recipe.workers.most <= psutil.virtual_memory().total / 2**30,
        recipe.run.batch_size / step,
        step * recipe.run.num_steps / 3600,
        0.0,
        max(seconds, key=lambda name: seconds[name]),
        seconds,
    )


def rewards_inline(recipe: Recipe) -> Recipe:
    """The recipe without actors for its rewards."""
    assert isinstance(recipe.task, Tuning)
    rewards = {name: reward.model_copy(update={"placement": "inline"}) for name, reward in recipe.task.rewards.items()}
    return recipe.model_copy(update={"task": recipe.task.model_copy(update={"rewards": rewards})})


def sample_rows(ids: dict[str, torch.Tensor], recipe: Recipe) -> Rows:
    """Rows as a worker reads them, of a step in which no guard measures more than usual."""
    size = len(next(iter(ids.values())))
    columns = {name.replace("text_encoder", IDS): tensor.numpy() for name, tensor in ids.items()}
    first = recipe.run.batch_size  # step 1
    return Rows(list(range(first, first + size)), {**columns, "prompt": np.array([PROMPT] * size, dtype=object)})
