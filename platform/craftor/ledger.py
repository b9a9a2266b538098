"""The sample ledger: which samples each optimiser step trained on -> a proof that every epoch used each exactly once.

Every checkpoint holds the whole of it, `trainer/ledger.jsonl`, so a run that goes on from a checkpoint goes on with the
ledger of the same step. A line covers the steps since the checkpoint before, as the workers have read them, and holds
the sha256 of the line above it.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from craftor import checkpoint
from craftor.recipe import Recipe, load

FILE = "ledger.jsonl"


class LedgerError(ValueError):
    """A ledger that does not prove what it should; the message names the step and the sample."""


class Ledger:
    """One worker's notes since the last checkpoint; all workers' become a line when one is written."""

    def __init__(self, recipe: Recipe, num_rows: int, shares: list[int], text: str) -> None:
        self.recipe, self.num_rows, self.shares, self.text = recipe, num_rows, shares, text
        self.notes: list[list[int]] = []

    def note(self, positions: list[int]) -> None:
        """A step was made with this worker's `positions`."""
        self.notes.append(positions)

    def close(self, step: int, device: torch.device) -> str:
        """The whole text up to `step`, the last one noted; all workers call it together."""
        own = torch.tensor(self.notes, dtype=torch.int64, device=device)
        steps = self._everyones(own).cpu().numpy()
        line = {
            "steps": [step - len(steps) + 1, step],
            "seed": self.recipe.seed,
            "batch_size": self.recipe.run.batch_size,
            "num_rows": self.num_rows,
            "workers": len(self.shares),
            "positions": [ranges(positions) for positions in steps],
            "above": _digest(self.text.splitlines()[-1]) if self.text else "",
        }
        self.notes = []
        self.text += json.dumps(line, separators=(",", ":")) + "\n"
        return self.text

    def _everyones(self, own: Tensor) -> Tensor:
        """Positions `(steps, batch)` of all workers; shares differ by one sample at most."""
        if len(self.shares) == 1:
            return own
        padded = torch.nn.functional.pad(own, (0, max(self.shares) - own.shape[1]))
        parts = [torch.empty_like(padded) for _ in self.shares]
        torch.distributed.all_gather(parts, padded)
        return torch.cat([part[:, :share] for part, share in zip(parts, self.shares, strict=True)], dim=1)


@dataclass(frozen=True)
class Audit:
    """What a ledger proves."""

    steps: int
    samples: int
    epochs: int
    """Whole ones: each sample exactly once."""
    remainder: int
    """Samples of the epoch begun, each at most once."""
    num_rows: int
    workers: list[int]
    """Their number, as it changed."""


def audit(run_dir: Path) -> Audit:
    """Check the newest checkpoint's ledger against its own files and the run's recipe.

    Raises LedgerError, and CheckpointError where one of the files has changed.
    """
    folder = checkpoint.latest(run_dir)
    if folder is None:
        raise LedgerError(f"{run_dir}: no complete checkpoint to audit")
    if not (folder / "trainer" / FILE).is_file():
        raise LedgerError(f"{folder}: written without a ledger")
    checkpoint.verify(folder)
    return check((folder / "trainer" / FILE).read_text(), load(run_dir / "recipe.toml"), checkpoint.step_of(folder))


def check(text: str, recipe: Recipe, num_steps: int) -> Audit:
    """Prove that `num_steps` steps used each sample of every epoch once, in batches fixed by the recipe."""
    seen: list[np.ndarray] = []
    workers: list[int] = []
    done, above, num_rows = 0, "", 0
    for number, text_line in enumerate(text.splitlines(), 1):
        line = json.loads(text_line)
        if line["above"] != above:
            raise LedgerError(f"ledger line {number} does not follow the line above it: one of them was changed")
        above = _digest(text_line)
        if line["seed"] != recipe.seed or line["batch_size"] != recipe.run.batch_size:
            raise LedgerError(
                f"ledger line {number} has seed {line['seed']} and batches of {line['batch_size']}; the recipe has "
                f"{recipe.seed} and {recipe.run.batch_size}"
            )
        first, last = line["steps"]
        if first != done + 1 or last - first + 1 != len(line["positions"]):
            raise LedgerError(f"ledger line {number} covers steps {first} to {last}, but step {done + 1} was due")
        if num_rows not in (0, line["num_rows"]):
            raise LedgerError(f"ledger line {number}: {line['num_rows']} samples an epoch, {num_rows} before")
        num_rows = line["num_rows"]
        for step, positions in enumerate(line["positions"], first):
            used = expanded(positions)
            if len(used) != recipe.run.batch_size:
                raise LedgerError(f"step {step} used {len(used)} samples instead of {recipe.run.batch_size}")
            seen.append(used)
        done = last
        if workers[-1:] != [line["workers"]]:
            workers.append(line["workers"])
    if done != num_steps:
        raise LedgerError(f"the ledger ends with step {done}, the checkpoint is of step {num_steps}")
    _each_once(seen, num_rows)
    _in_their_steps(seen, recipe.run.batch_size)
    epochs, remainder = divmod(num_steps * recipe.run.batch_size, num_rows)
    return Audit(num_steps, num_steps * recipe.run.batch_size, epochs, remainder, num_rows, workers)


def _each_once(seen: list[np.ndarray], num_rows: int) -> None:
    """Positions 0, 1, 2, … are samples 0 to num_rows - 1 of epoch after epoch."""
    used = np.sort(np.concatenate(seen))
    for position in used[:-1][np.diff(used) == 0][:1]:
        epoch, sample = divmod(int(position), num_rows)
        raise LedgerError(f"sample {sample} of epoch {epoch} was used twice")
    for position in np.flatnonzero(used != np.arange(len(used)))[:1]:
        epoch, sample = divmod(int(position), num_rows)
        raise LedgerError(f"sample {sample} of epoch {epoch} was not used")


def _in_their_steps(seen: list[np.ndarray], batch_size: int) -> None:
    for step, used in enumerate(seen):
        if used.min() // batch_size != step or used.max() // batch_size != step:
            raise LedgerError(f"step {step + 1} used samples of another step's batch")


def ranges(positions: np.ndarray) -> list[int]:
    """Numbers in any order -> `[start, stop, start, stop, …]`, which for a whole batch is one pair."""
    ordered = np.sort(positions)
    cuts = np.flatnonzero(np.diff(ordered) != 1) + 1
    return [int(end) for part in np.split(ordered, cuts) for end in (part[0], part[-1] + 1)]


def expanded(pairs: list[int]) -> np.ndarray:
    """The inverse of `ranges`."""
    return np.concatenate([np.arange(start, stop) for start, stop in zip(pairs[::2], pairs[1::2], strict=True)])


def _digest(line: str) -> str:
    return hashlib.sha256(line.encode()).hexdigest()
