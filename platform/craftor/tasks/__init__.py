"""Tasks: what one optimiser step computes. `fit` knows only this protocol."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from craftor.diffuser import Diffuser
from craftor.recipe import Recipe
from craftor.scoring import Elsewhere
from craftor.stream import Rows


class Task(Protocol):
    module: nn.ModuleDict
    """The parts of the pipeline that train, by name; all others are frozen."""
    rates: Mapping[str, float | None]
    """Learning rates of parts that have their own."""
    diffuser: Diffuser
    """The pipeline, of which all parts but those that train are frozen."""

    def step(self, rows: Rows, share: float = 1.0) -> dict[str, Tensor]:
        """Forward and backward for a slice of a batch.

        Adds the gradient of `share` times the slice's mean loss to the parameters; returns per-sample metrics, `loss`
        first: one number a sample, or a row of them that `observe` makes sense of.
        """
        ...

    @property
    def needs_start(self) -> bool:
        """Whether a step follows from running statistics, and there are none yet: `observe` a batch first."""
        ...

    def observe(self, metrics: Mapping[str, Tensor]) -> dict[str, float]:
        """The whole batch's metrics, the same on every worker -> the figures to log; running statistics move on."""
        ...

    def state(self) -> dict[str, float]:
        """Running statistics, for a checkpoint; `restore` takes them back."""
        ...

    def restore(self, state: Mapping[str, float]) -> None: ...

    def pictures(self) -> Tensor | None:
        """The images of the last step in [0, 1], where the task makes any: to look at, logged with checkpoints."""
        ...

    def save(self, folder: Path, module: nn.ModuleDict | None = None) -> None:
        """Write what trains into `folder` as the pipeline layout has it: `text_encoder/`, `unet/`, `lora/`.

        `module` has its weights where those of `self.module` are sharded: a task that cannot be takes None alone.
        """
        ...

    def assert_frozen(self) -> None:
        """Every part but `module` is without gradient."""
        ...


def build(recipe: Recipe, device: torch.device | str = "cpu", elsewhere: Mapping[str, Elsewhere] | None = None) -> Task:
    """The task a recipe names, with its models on a device; `elsewhere` computes the rewards that are not inline."""
    if recipe.task.kind == "reward_tuning":
        from craftor.tasks.reward_tuning import RewardTuningTask

        return RewardTuningTask(recipe, device, elsewhere)
    if recipe.task.kind == "policy_gradient":
        from craftor.tasks.policy_gradient import PolicyGradientTask

        return PolicyGradientTask(recipe, device, elsewhere)
    if recipe.task.kind == "reward_weighted":
        from craftor.tasks.reward_weighted import RewardWeightedTask

        return RewardWeightedTask(recipe, device, elsewhere)
    if recipe.task.kind == "direct_tuning":
        from craftor.tasks.direct_tuning import DirectTuningTask

        return DirectTuningTask(recipe, device, elsewhere)
    if recipe.task.kind == "object_encoder":
        from craftor.tasks.object_encoder import ObjectEncoderTask

        return ObjectEncoderTask(recipe, device)
    from craftor.tasks.denoising import DenoisingTask

    return DenoisingTask(recipe, device)
