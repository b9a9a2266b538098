"""Guards on a run's folder: verdicts in `guard.json`, pictures beside them, and what is left when one ends a run."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from craftor import checkpoint
from craftor.guards import Record, Rule, verdict
from craftor.pictures import save_sheet
from craftor.run_files import write_json

GUARD = "guard.json"
SET_ASIDE = "discarded-"


class Watch:
    """The rules over the metrics so far. Its memory is the run's own files, so that a resumed run judges alike."""

    def __init__(self, rules: Sequence[Rule], run_dir: Path, metrics: Path, step: int) -> None:
        self.rules, self.run_dir = rules, run_dir
        self.history: list[Record] = [json.loads(line) for line in metrics.read_text().splitlines()]
        # What was said of steps that are done again will be said again.
        self.said = [said for said in read(run_dir) if said["step"] <= step]

    def ends(self, record: Record, images: Float[Tensor, "b 3 H W"] | None) -> bool:
        """Judge the history with one more line; whether the run ends with it. `images` are those of its step."""
        self.history.append(record)
        found = verdict(self.rules, self.history)
        if found is None:
            return False
        pictures = None
        if images is not None:
            pictures = f"samples/guard-step-{found.step:06d}.png"
            save_sheet(images, self.run_dir / pictures)
        self.said.append({**asdict(found), "pictures": pictures})
        write_json(self.run_dir / GUARD, self.said)
        return found.action != "warn"


def read(run_dir: Path) -> list[dict]:
    """The verdicts on a run so far, as `guards.Verdict` has them, with the pictures' path."""
    path = run_dir / GUARD
    return json.loads(path.read_text()) if path.exists() else []


def ended(run_dir: Path) -> dict | None:
    """The verdict that ended the run, if one has."""
    return next((said for said in read(run_dir) if said["action"] != "warn"), None)


def roll_back(run_dir: Path, last_good_step: int) -> Path | None:
    """Set aside the checkpoints of later steps, under names that nothing reads; returns the last that is left."""
    for path in sorted((run_dir / "checkpoints").glob("step-*")):
        if checkpoint.step_of(path) > last_good_step:
            aside = path.with_name(SET_ASIDE + path.name)
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
    return checkpoint.latest(run_dir)
