"""What the stages of `craftor_micro.build` share: their options, and the record of how weights were made."""

import json
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

WEIGHTS, PARTS = Path("platform/craftor_micro/weights"), Path("runs/micro")
Out = Annotated[Path, typer.Option(help="Folder to write: weights in half precision and scores.json.")]
Steps = Annotated[int, typer.Option(min=1, help="Optimiser updates.")]
Seed = Annotated[int, typer.Option(help="Seeds renders, initial weights and batches.")]
Renders = Annotated[int, typer.Option(min=256, help="Training images.")]


def begin(seed: int) -> float:
    """One thread, a seeded torch; the time."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    return time.time()


def finish(
    out: Path, seed: int, started: float, scores: dict[str, float], *, continued: dict[str, object] | None = None
) -> None:
    """Write `scores.json`: how the weights were made (and those they continue), and how good they are."""
    rounded = {name: round(value, 4) for name, value in scores.items()}
    command = shlex.join(["python", "-m", "craftor_micro.build", *sys.argv[1:]])
    record = {"command": command, "seed": seed, "seconds": round(time.time() - started), "scores": rounded}
    if continued is not None:
        record["continued_from"] = continued
    (out / "scores.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))
