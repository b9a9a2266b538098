"""`make bench-scale`: what workers, checkpoints, deaths and large prompt sets cost, and how right `craftor plan` is.

Every run is the shipped micro recipe on real Ray; `scale_prompts` has the prompts that are only read.
"""

import argparse
import json
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import ray
import torch
from rich.console import Console

from benchmarks import harness
from benchmarks.scale_prompts import read_prompts
from craftor import calibrate, chief, estimate, job, ledger
from craftor.cluster import ray_session
from craftor.locate import shipped_recipe
from craftor.recipe import Recipe, load
from craftor.remote import StopRequest
from craftor.tasks import build

RECIPE = shipped_recipe("micro_textcraftor.toml")


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    steps: int = 20
    """Optimiser steps of a run."""
    pairs: int = 3
    """Of runs with one worker and with two, in turn: a machine's speed may change between any two runs."""
    rounds: int = 8
    """Of steps with and without checkpoints, in turn."""
    prompts: int = 1_000_000
    share: int = 12
    """Samples per worker and step: the recipe's own."""
    every: int = 20
    """Steps between two checkpoints."""
    share_with_checkpoints: int = 2
    """Samples of a step beside which checkpoints are written: few, so that what they cost shows."""


QUICK = Size(steps=8, pairs=1, rounds=1, prompts=20_000, share=2, every=4, share_with_checkpoints=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=Size.steps, help="optimiser steps of a run")
    parser.add_argument("--rounds", type=int, default=Size.rounds, help="of steps with and without checkpoints")
    parser.add_argument("--prompts", type=int, default=Size.prompts)
    parser.add_argument("--quick", action="store_true", help="everything once and small: does it run?")
    parser.add_argument("--only-prompts", action="store_true", help="read prompts and nothing else, into prompts.json")
    arguments = parser.parse_args()
    size = QUICK if arguments.quick else Size(steps=arguments.steps, rounds=arguments.rounds, prompts=arguments.prompts)
    started = time.perf_counter()
    console, model = Console(width=120), recipe_of(size, 1).model
    if arguments.only_prompts:
        with TemporaryDirectory(prefix="bench-") as folder, ray_session(2):
            read = read_prompts(model, Path(folder), size.prompts)
        console.print(harness.write("prompts", figures=read, details={}, started=started))
        return
    # One Ray for all; prompts first, before anything else has left memory in use.
    with TemporaryDirectory(prefix="bench-") as folder, ray_session(2):
        runs = Path(folder)
        read = read_prompts(model, runs, size.prompts)
        scaled = [(run(runs / f"one-{i}", size, 1), run(runs / f"two-{i}", size, 2)) for i in range(size.pairs)]
        recovered = recovery(runs / "killed", size)
        overhead = checkpoint_overhead(runs / "overhead", size)
    # As `craftor plan` does it: in a process that has done nothing else.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        planned = fresh.submit(plan, size).result()
    scaling = [two["images_per_second"] / (2 * one["images_per_second"]) for one, two in scaled]
    one, two = ({name: median(r[name] for r in made) for name in made[0]} for made in zip(*scaled, strict=True))
    step, planned_step = 2 * size.share / two["images_per_second"], sum(planned.seconds.values())
    figures = {
        "weak_scaling_2": median(scaling),
        "checkpoint_overhead": overhead["overhead"],
        "recovery_seconds": recovered,
        "prompts_per_second": read["prompts_per_second"],
        "prompts_peak_gib": read["peak_gib"],
        "prompts_over_training": read["prompts_per_second"] / two["images_per_second"],
        "plan_time_error": abs(planned_step / step - 1),
        "plan_memory_error": abs(planned.memory_gib / two["worker_gib"] - 1),
    }
    details: dict[str, Any] = {
        "settings": asdict(size),
        "weak_scaling_pairs": scaling,
        "one_worker": one,
        "two_workers": two,
        "plan": {"step_seconds": [planned_step, step], "gib": [planned.memory_gib, two["worker_gib"]]},
        "prompts": read,
        "checkpoints": overhead,
    }
    for name, value in figures.items():
        console.print(f"{name:24s} {value:.4g}", highlight=False)
    console.print(harness.write("scale", figures=figures, details=details, started=started))


def recipe_of(size: Size, num_workers: int, **changes: object) -> Recipe:
    own = {"workers.num": num_workers, "run.batch_size": num_workers * size.share, "run.num_steps": size.steps}
    return load(RECIPE, {**own, "run.checkpoint_every": 1000, "register": None, "evaluation": None, **changes})


def run(out: Path, size: Size, num_workers: int) -> dict[str, float]:
    """Images/s of a run, the first steps left out, and the most memory that one worker had."""
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.5):
            peak[0] = max([peak[0], *(process.memory_info().rss for process in workers())])

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    job.train(recipe_of(size, num_workers), RECIPE, out)
    done.set()
    thread.join()
    speeds = [json.loads(line)["images_per_second"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {"images_per_second": median(speeds[len(speeds) // 4 :]), "worker_gib": peak[0] / 2**30}


def workers() -> list[psutil.Process]:
    """The training workers among this process's descendants."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def plan(size: Size) -> estimate.Prediction:
    recipe = recipe_of(size, 2)
    return calibrate.predict(recipe, estimate.count(recipe))


def recovery(out: Path, size: Size) -> float:
    """Seconds from `kill -9` of one of two workers, after a checkpoint, to the next line of metrics."""
    killed: list[float] = []
    back: list[float] = []

    def num_lines() -> int:
        return len((out / "metrics.jsonl").read_text().splitlines())

    def kill() -> None:
        while not (out / "checkpoints" / "step-000004").exists():
            time.sleep(0.05)
        workers()[0].kill()
        killed.append(time.monotonic())
        time.sleep(1)  # a line that was on its way
        written = (out / "metrics.jsonl").stat().st_mtime_ns
        # The restart cuts the file back to step 4; the fifth line is the next step.
        while (out / "metrics.jsonl").stat().st_mtime_ns == written or num_lines() <= 4:
            time.sleep(0.05)
        back.append(time.monotonic())

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    job.train(recipe_of(size, 2, **{"run.checkpoint_every": 4, "run.num_steps": 8}), RECIPE, out)
    thread.join(timeout=10)
    return back[0] - killed[0]


def checkpoint_overhead(out: Path, size: Size) -> dict[str, float]:
    """`size.every` steps with ledger and a checkpoint written beside them, over as many without, in turn."""
    share = size.share_with_checkpoints
    recipe = recipe_of(size, 1, **{"run.num_steps": 10_000, "run.batch_size": share})
    task = build(recipe)
    rows = calibrate.sample_rows(task.diffuser.tokenize([calibrate.PROMPT] * share), recipe)
    parameters = [p for p in task.module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)
    out.mkdir()
    torch.set_num_threads(1)

    def steps(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            task.step(rows)
            optimizer.step()

    actor = ray.remote(StopRequest).options(num_cpus=0).remote()
    lead = chief.Chief(recipe, out, 0, actor)
    book, done = ledger.Ledger(recipe, 1000, [share], ""), [0]

    def saving() -> None:
        for step in range(size.every):
            steps(1)
            done[0] += 1
            book.note(list(range((done[0] - 1) * share, done[0] * share)))
            if step == size.every // 2:  # so that what is done beside training is done beside these steps
                lead.save(done[0], task, optimizer, None, book.close(done[0], torch.device("cpu")))

    variants = {"with": saving, "without": lambda: steps(size.every)}
    times = harness.in_turn(variants, rounds=size.rounds, warmup=1)
    lead.saver.wait()
    found = harness.ratio(times["with"], times["without"])
    ratio, (low, high) = found["wall"], found["wall_ci95"]
    return {"overhead": ratio - 1, "low": low - 1, "high": high - 1}


if __name__ == "__main__":
    main()
