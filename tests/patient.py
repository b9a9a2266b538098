"""A reward that takes its time: a run that is watched from outside then waits between its steps, and computes little.

What it waits for shows in no number: the run that it is compared with need not be patient.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

SECONDS = "PATIENT_SECONDS"


class Patient:
    """The mean of the pixels, after as many seconds as the environment says; at once where it says nothing."""

    differentiable, needs_prompt = False, False

    def __init__(self, weights: str | Path) -> None:
        self.seconds = float(os.environ.get(SECONDS, 0))

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        time.sleep(self.seconds)
        return images.mean((1, 2, 3))


def watch(recipe: Path) -> None:
    """Let it look at the images of a recipe's every step; it changes nothing."""
    with recipe.open("a") as file:
        file.write('patient = { kind = "patient:Patient", weights = "none", evaluation_only = true, every = 1 }\n')


def environment(seconds: float, *roots: Path) -> dict[str, str]:
    """For processes that train: this module's folder in their path, after `roots`, and their patience."""
    path = [*map(str, roots), str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {SECONDS: str(seconds), "PYTHONPATH": os.pathsep.join(path)}
