"""What the tasks share that make several samples of each prompt and learn from how their scores compare.

A row of the batch is a prompt; its samples are made together, so that what a row teaches depends on that row alone,
whatever the workers and micro-batches.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from craftor.denoise import Prompt
from craftor.recipe import Recipe, Sampled
from craftor.scoring import Elsewhere
from craftor.tasks.reward_tuning import RewardTuningTask


class SampledTask(RewardTuningTask):
    """The same encoders, rewards and checkpoints as tuning by the rewards' gradient, of which only scores are asked."""

    def __init__(
        self, recipe: Recipe, device: torch.device | str = "cpu", elsewhere: Mapping[str, Elsewhere] | None = None
    ) -> None:
        assert isinstance(recipe.task, Sampled)
        super().__init__(recipe, device, elsewhere)
        self.many = recipe.task.samples_per_prompt

    def observe(self, metrics: Mapping[str, Tensor]) -> dict[str, float]:
        return super().observe({name: values.flatten(0, 1) for name, values in metrics.items()})

    def each(self, prompt: Prompt) -> Prompt:
        """Each prompt as often as it is sampled."""
        again = torch.arange(len(prompt.condition)).repeat(self.many)
        return Prompt(prompt.condition[again], prompt.null)
