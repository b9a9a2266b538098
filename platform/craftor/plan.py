"""A batch's windows, drawn sample by sample, as two tables that the chain reads."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from craftor import seeds
from craftor.rollout import Window, draw


@dataclass(frozen=True)
class Plan:
    """Which denoising steps carry gradient, and where samples end, row by row."""

    window: Bool[Tensor, "b n"]
    end: Int[Tensor, " b"]
    """Each row's last step."""
    jumps: bool
    """Whether rows end by the clean latents predicted at their last step, or by taking that step."""
    first: Int[Tensor, " b"]
    """Each row's earliest step that carries gradient."""

    def __getitem__(self, rows: Tensor) -> "Plan":
        return Plan(self.window[rows], self.end[rows], self.jumps, self.first[rows])

    @property
    def num_steps(self) -> int:
        return self.window.shape[1]

    @property
    def start(self) -> int:
        """The batch's earliest step that carries gradient."""
        return int(self.first.min())


def plan(window: Window, num_steps: int, seed: int, positions: Sequence[int]) -> Plan:
    """Draw each sample's window from (run seed, sample index): batches and workers change nothing."""
    chosen = seeds.uniform(seed, positions, "window steps").tolist()
    ends = seeds.uniform(seed, positions, "window end").tolist()
    drawn = [draw(window, num_steps, end, choice) for end, choice in zip(ends, chosen, strict=True)]
    table = torch.zeros(len(drawn), num_steps, dtype=torch.bool)
    for row, sample in zip(table, drawn, strict=True):
        row[list(sample.steps)] = True
    end = torch.tensor([num_steps - 1 if sample.end is None else sample.end for sample in drawn])
    return Plan(table, end, window.jump is not None, table.int().argmax(dim=1))
