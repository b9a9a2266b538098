"""`make bench-gpu`: how fast Stable Diffusion 1.5's size trains on one GPU, and how near to what the GPU can do.

Random weights of the real shapes: the pipeline of Stable Diffusion 1.5 at 512 pixels, CLIP-L and CLIP-H as rewards.
Encoder tuning from a cached prefix and whole-UNet tuning, in bf16, with each attention that can run here. Operations
are counted by torch on one step with `sdpa`, whose kernels it knows; the peak is that of a large bf16 matrix product.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console

from benchmarks import harness
from benchmarks.craftor_variants import CraftorStep
from benchmarks.gpu_models import SHAPES, stable_diffusion
from benchmarks.models import Workload
from craftor.attention import xformers_obstacle
from craftor.flops import counting
from craftor.quiet import hush

TUNED = {"encoder": {"trains": "text_encoder", "cached": True}, "unet": {"trains": "unet"}}
"""What trains, as `CraftorStep` is told."""
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="sd15", help="tiny tries the script without a GPU")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU here; `--shape tiny --device cpu` tries the script on a CPU")
    started = time.perf_counter()
    hush()
    console = Console(width=120)
    peak = matrix_peak(device, 8192 if device.type == "cuda" else 512)
    figures = {"matrix_peak_tflops": peak / 1e12}
    details: dict[str, object] = {}
    with TemporaryDirectory() as folder:
        work = stable_diffusion(arguments.shape, arguments.batch_size, Path(folder))
        for tuned in TUNED:
            flops = operations(work, device, tuned)
            for attention in kernels(work, device):
                found, times = measure(work, device, tuned, attention, arguments.rounds, arguments.warmup)
                seconds = found["seconds"]
                own = {
                    "samples_per_second": arguments.batch_size / seconds,
                    "tflops": flops / seconds / 1e12,
                    "share_of_peak": flops / seconds / peak,
                    "peak_memory_gib": found["peak_memory_gib"],
                }
                figures |= {f"{tuned}_{attention}_{key}": value for key, value in own.items()}
                details[f"{tuned}, {attention}"] = times
    for key, value in figures.items():
        console.print(f"{key:40s} {value:.4g}", highlight=False)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    details |= {"device": name, "settings": vars(arguments)}
    console.print(harness.write("gpu", figures=figures, details=details, started=started))


def step(work: Workload, device: torch.device, tuned: str, attention: str) -> CraftorStep:
    """A step in bf16, channels last, as a recipe for a GPU sets it."""
    model = {"precision": "bf16", "attention": attention, "channels_last": True}
    return CraftorStep(work, device=device, model=model, **TUNED[tuned])  # type: ignore[arg-type]  # see TUNED


def kernels(work: Workload, device: torch.device) -> list[str]:
    """`sdpa`, and `xformers` where it can run this UNet."""
    unet = step(work, device, "encoder", "sdpa").task.diffuser.unet
    return ["sdpa"] if xformers_obstacle(unet, device) else ["sdpa", "xformers"]


def operations(work: Workload, device: torch.device, tuned: str) -> int:
    """Floating-point operations of one training step."""
    variant = step(work, device, tuned, "sdpa")
    variant.step()  # what is made once, like a cached prefix, does not count
    with counting() as counter:
        variant.step()
    return counter.get_total_flops()


def measure(
    work: Workload, device: torch.device, tuned: str, attention: str, rounds: int, warmup: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of a step and the peak of its memory; the times' summary for `details`."""
    variant = step(work, device, tuned, attention)

    def finished() -> None:
        variant.step()
        wait(device)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = harness.in_turn({"step": finished}, rounds=rounds, warmup=warmup)["step"].summary()
    peak = torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else 0.0
    return {"seconds": times["wall_median"], "peak_memory_gib": peak}, times


def matrix_peak(device: torch.device, size: int, repeats: int = 20) -> float:
    """Operations a second of a bf16 matrix product, the best of `repeats`."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = [timed(lambda: a @ b, device) for _ in range(repeats)]
    return 2 * size**3 / min(seconds)


def timed(call: Callable[[], object], device: torch.device) -> float:
    wait(device)
    begun = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - begun


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
