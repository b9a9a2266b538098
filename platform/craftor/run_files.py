"""What training writes into a run's folder.

`metrics.jsonl` has one line a step, `failure.json` says why a run cannot go on, `notes.jsonl` what it got over;
`validations/` has what was found of checkpoints meanwhile.
"""

import json
import math
import os
import time
from pathlib import Path

from torch import Tensor

from craftor import stream
from craftor.recipe import Recipe

METRICS, FAILURE, NOTES, VALIDATIONS = "metrics.jsonl", "failure.json", "notes.jsonl", "validations"


class MetricsLog:
    """`metrics.jsonl`: one line an optimiser step; lines past the step a run resumes from are cut off."""

    def __init__(self, path: Path, step: int) -> None:
        kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step] if path.exists() else []
        path.write_text("".join(f"{line}\n" for line in kept))
        self._file = path.open("a", buffering=1)

    def write(self, record: dict[str, float]) -> None:
        self._file.write(json.dumps(record) + "\n")


def report_failure(run_dir: Path, rows: stream.Rows, recipe: Recipe, metrics: dict[str, Tensor]) -> None:
    """The worker that owns the first bad sample writes what is needed to make it again; all workers return."""
    own = range(rows.position[0] % recipe.run.batch_size, rows.position[-1] % recipe.run.batch_size + 1)
    # A single reward says more than the sums that it spoils.
    for name in sorted(metrics, key=lambda name: name in ("loss", "total")):
        values = metrics[name]
        bad = (~values.isfinite()).reshape(len(values), -1).any(dim=1).nonzero().flatten()
        if len(bad) and int(bad[0]) in own:
            row = int(bad[0]) - own.start
            prompt = str(rows.columns["prompt"][row]) if "prompt" in rows.columns else "(no prompt)"
            value = values[bad[0]].item() if values.ndim == 1 else "not finite"
            message = (
                f"{name} is {value} for sample {rows.position[row]} (seed {recipe.seed}), "
                f"prompt {prompt!r}; the last checkpoint stands"
            )
            write_json(run_dir / FAILURE, {"message": message, "prompt": prompt, "sample": rows.position[row]})
            return


def report_gradient(run_dir: Path, step: int, norm: Tensor, rank: int) -> None:
    """All scores are finite but their gradient is not."""
    if rank == 0:
        message = (
            f"the gradient's norm is {norm.item()} at step {step + 1} though every score is finite: the window reaches "
            'too far back for this precision; fewer steps, or gradient_path = "direct"; the last checkpoint stands'
        )
        write_json(run_dir / FAILURE, {"message": message})


def note(run_dir: Path, message: str) -> None:
    """Something that a run survived and its owner should know."""
    with (run_dir / NOTES).open("a") as file:
        file.write(json.dumps({"time": time.time(), "note": message}) + "\n")


def notes(run_dir: Path) -> list[str]:
    """All of them, oldest first."""
    path = run_dir / NOTES
    return [json.loads(line)["note"] for line in path.read_text().splitlines()] if path.exists() else []


def write_json(path: Path, data: dict | list) -> None:
    """Write and rename, so that a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(data, indent=2))
    temporary.rename(path)


def _step_of(line: str) -> float:
    """A torn last line, as a kill leaves it, counts as past every step."""
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return math.inf
