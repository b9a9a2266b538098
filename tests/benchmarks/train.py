"""`make bench-train`: how fast and how large a training step is, against its floor and against others' procedures.

Per model, in one process and in turn: Craftor's encoder step (prefix in the worker, prefix cached), the paper's own
procedure, Craftor's UNet step and TRL's (LoRA and full), and the calls no encoder step can avoid, each alone. fp32, one
thread. Before anything is timed, the gradients of those that claim the same function are compared.
"""

import argparse
import math
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.craftor_variants import CraftorStep
from benchmarks.harness import CLOCKS, Times
from benchmarks.models import Workload, workload
from benchmarks.paper_procedure import PaperProcedure
from benchmarks.trl_alignprop import AlignProp
from craftor.quiet import hush

MODELS = ("tiny", "micro")
TOLERANCE = 1e-5
"""Of gradients, relative."""
SPEEDUPS = {
    "speedup_in_worker": ("paper's procedure", "encoder, prefix in worker"),
    "speedup_cached": ("paper's procedure", "encoder, prefix cached"),
    "speedup_trl_lora": ("TRL AlignProp, LoRA", "UNet LoRA"),
    "speedup_trl_unet": ("TRL AlignProp, UNet", "UNet"),
}
"""Figure: (slow, fast)."""
MEMORY_BATCH = 16
"""Large enough that activations outweigh what a first step allocates once."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--batch-size", type=int, default=4, help="TextCraftor's batch of one GPU is 4")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    arguments = parser.parse_args()
    if find_spec("trl") is None:
        parser.error(
            "trl 0.23.1 is not on the path; `make bench-train` installs it beside the project and puts it there"
        )
    started = time.perf_counter()
    hush()
    torch.set_num_threads(1)
    console = Console(width=120)

    details: dict[str, dict] = {}
    with TemporaryDirectory() as folder:
        for name in arguments.models:
            work = workload(name, arguments.batch_size, Path(folder))
            difference = compare_gradients(work)
            times, floor = time_all(work, arguments.rounds, arguments.warmup)
            console.print(
                harness.table(f"{name}, batch {arguments.batch_size}", times, images=arguments.batch_size),
                harness.table(f"{name}: calls of one encoder step", floor),
            )
            details[name] = report(times, floor) | {"gradient_difference": difference}
        memory = measure_memory(folder)
    console.print(memory_table(memory))
    figures = collect(details) | {
        "memory_k20_over_k1": memory["K=20, all replayed"]["total"] / memory["K=1, all replayed"]["total"],
        "memory_added_k20_over_k1": memory["K=20, all replayed"]["peak"] / memory["K=1, all replayed"]["peak"],
    }
    details |= {"memory": memory, "settings": vars(arguments) | {"window": work.window, "num_steps": work.num_steps}}
    for key, value in figures.items():
        console.print(f"{key:32s} {value:.4g}", highlight=False)
    console.print(harness.write("train", figures=figures, details=details, started=started))


def compare_gradients(work: Workload) -> dict[str, float]:
    """Relative distance of gradients from the same noise. Raises RuntimeError where two functions are not the same."""
    encoder, paper = CraftorStep(work), PaperProcedure(work)
    unet, trl = CraftorStep(work, trains="unet"), AlignProp(work, train="full")
    noise = encoder.noise()
    calls = trl.unet_calls(noise)
    if calls != work.num_steps + work.window:
        raise RuntimeError(f"TRL made {calls} UNet calls; expected {work.num_steps} and {work.window} recomputed")
    for variant in (encoder, paper, unet, trl):
        variant.backward(noise)
    difference = {
        "encoder, Craftor and paper's procedure": relative_distance(encoder.module, paper.module),
        "UNet, Craftor and TRL": relative_distance(unet.module, trl.module),
    }
    for pair, distance in difference.items():
        if not distance <= TOLERANCE:
            raise RuntimeError(f"{pair}: gradients of '{work.name}' differ by {distance:.1e}; allowed: {TOLERANCE}")
    return difference


def relative_distance(ours: nn.Module, theirs: nn.Module) -> float:
    """`|a - b| / |b|` over all parameters that have a gradient in either."""
    a, b = gradients(ours), gradients(theirs)
    assert a.keys() == b.keys(), f"gradient on one side only: {sorted(a.keys() ^ b.keys())}"
    apart = sum((a[name] - b[name]).square().sum().item() for name in b)
    return math.sqrt(apart / sum(value.square().sum().item() for value in b.values()))


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def time_all(work: Workload, rounds: int, warmup: int) -> tuple[dict[str, Times], dict[str, Times]]:
    """Times of the variants, and of the floor's calls with their sum, all taken in the same rounds."""
    encoder = CraftorStep(work)
    variants: dict[str, Callable[[], object]] = {
        "encoder, prefix in worker": encoder.step,
        "encoder, prefix cached": CraftorStep(work, cached=True).step,
        "encoder, replayed window": CraftorStep(work, recompute=True).step,
        "paper's procedure": PaperProcedure(work).step,
        "paper's procedure, its own scores": PaperProcedure(work, mathematics="paper").step,
        "UNet LoRA": CraftorStep(work, trains="unet_lora").step,
        "TRL AlignProp, LoRA": AlignProp(work, train="lora").step,
        "UNet": CraftorStep(work, trains="unet").step,
        "TRL AlignProp, UNet": AlignProp(work, train="full").step,
    }
    calls = encoder.floor()
    times = harness.in_turn(variants | calls, rounds=rounds, warmup=warmup)
    floor = {name: times[name] for name in calls}
    first, *others = floor.values()
    return {name: times[name] for name in variants}, floor | {"floor": sum(others, start=first)}


def report(times: Mapping[str, Times], floor: Mapping[str, Times]) -> dict:
    """Medians, spreads and ratios of one model, for `details`."""
    ratios = {key: harness.ratio(times[slow], times[fast]) for key, (slow, fast) in SPEEDUPS.items()}
    ratios["floor_ratio"] = harness.ratio(times["encoder, prefix in worker"], floor["floor"])
    return {
        "ratios": ratios,
        "variants": {name: own.summary() for name, own in times.items()},
        "floor": {name: own.summary() for name, own in floor.items()},
    }


def collect(details: Mapping[str, dict]) -> dict[str, float]:
    """One number a figure: the worst of the models, by the wall's clock and (`..._cpu`) the processor's."""
    figures = {}
    for key in ("floor_ratio", *SPEEDUPS):
        worst = max if key == "floor_ratio" else min
        for clock in CLOCKS:
            name = key if clock == "wall" else f"{key}_{clock}"
            figures[name] = worst(model["ratios"][key][clock] for model in details.values())
    figures["gradient_difference"] = max(max(model["gradient_difference"].values()) for model in details.values())
    return figures


REPLAYS: dict[str, Callable[[int], bool | int]] = {
    "all stored": lambda window: False,
    "half replayed": lambda window: window // 2,
    "all replayed": lambda window: True,
}
"""The recipe's `window.recompute` for a window of so many steps."""


def measure_memory(folder: str) -> dict[str, dict[str, float]]:
    """Resident MiB of training steps and the part the steps add once models are loaded, by window and replay."""
    workload("tiny", MEMORY_BATCH, Path(folder))  # its files are there before the first process, as before the others
    return {
        f"K={window}, {name}": harness.peak_memory(
            "benchmarks.craftor_variants:encoder_step",
            model="tiny",
            folder=folder,
            batch_size=MEMORY_BATCH,
            window=window,
            recompute=recompute(window),
        )
        for window in (1, 5, 20)
        for name, recompute in REPLAYS.items()
        if window > 1 or name != "half replayed"
    }


def memory_table(memory: Mapping[str, Mapping[str, float]]) -> Table:
    table = Table(
        title=f"tiny, batch {MEMORY_BATCH}: memory and time of a step in a fresh process", title_justify="left"
    )
    for column in ("window", "MiB added by steps", "MiB in all", "cpu ms"):
        table.add_column(column, justify="left" if column == "window" else "right")
    for name, own in memory.items():
        table.add_row(name, f"{own['peak']:.1f}", f"{own['total']:.1f}", f"{1e3 * own['cpu_seconds']:.1f}")
    return table


if __name__ == "__main__":
    main()
