"""Scores -> advantages: how much better a sample is than others of its prompt, so that easy prompts teach nothing."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

_SMALL = 1e-6
_PROMPTS = "all prompts"


def group_relative(totals: Float[Tensor, "b k"]) -> Float[Tensor, "b k"]:
    """(score - mean) / standard deviation within each prompt's k samples (GRPO, Shao et al. 2024); equal ones get 0."""
    spread = totals.std(dim=1, correction=0, keepdim=True)
    # What rounding leaves between equal scores is no difference.
    alike = spread <= _SMALL * totals.abs().amax(dim=1, keepdim=True).clamp(min=_SMALL)
    return torch.where(alike, 0.0, (totals - totals.mean(dim=1, keepdim=True)) / spread.clamp(min=1e-30))


class PromptBaselines:
    """Running mean and spread of each prompt's scores (DDPO, Black et al. 2023), from the batches before.

    A prompt that has been sampled less than `min_count` times has those of all prompts together. Prompts go by number.
    Statistics move in `observe`, once a step and from the whole batch, so they are the same on every worker.
    """

    def __init__(self, min_count: int, memory: int) -> None:
        self.min_count, self.memory = min_count, memory
        self.known: dict[str, list[float]] = {}
        """By prompt: number of samples seen, mean and mean square, which forget what is more than `memory` ago."""

    @property
    def needs_start(self) -> bool:
        return not self.known

    def __call__(self, totals: Float[Tensor, "b k"], numbers: Float[Tensor, " b"]) -> Float[Tensor, "b k"]:
        """(score - mean) / standard deviation of the prompt; 0 while nothing is known."""
        if self.needs_start:
            return torch.zeros_like(totals)
        rows = [self._of(str(int(number))) for number in numbers]
        known = torch.tensor([row[1:] for row in rows], dtype=torch.float64, device=totals.device)
        means, squares = known[:, :1], known[:, 1:]
        spread = (squares - means**2).clamp(min=0).sqrt().clamp(min=_SMALL)
        return ((totals - means) / spread).to(totals.dtype)

    def observe(self, totals: Float[Tensor, "b k"], numbers: Float[Tensor, " b"]) -> None:
        for number, scores in zip(numbers.tolist(), totals.double().tolist(), strict=True):
            for score in scores:
                for key in (str(int(number)), _PROMPTS):
                    count, mean, square = self.known.get(key, [0.0, 0.0, 0.0])
                    weight = 1 / min(count + 1, self.memory)
                    self.known[key] = [count + 1, mean + weight * (score - mean), square + weight * (score**2 - square)]

    def state(self) -> dict[str, float]:
        columns = list(enumerate(("count", "mean", "square")))
        return {f"{name}/{key}": row[column] for key, row in self.known.items() for column, name in columns}

    def restore(self, state: Mapping[str, float]) -> None:
        keys = [name.removeprefix("count/") for name in state if name.startswith("count/")]
        self.known = {key: [state[f"{name}/{key}"] for name in ("count", "mean", "square")] for key in keys}

    def _of(self, key: str) -> list[float]:
        row = self.known.get(key)
        return row if row is not None and row[0] >= self.min_count else self.known[_PROMPTS]
