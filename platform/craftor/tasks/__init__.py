"""Tasks: what one optimiser step computes. `fit` knows only this protocol."""

from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from craftor.recipe import Recipe
from craftor.stream import Rows


class Task(Protocol):
    module: nn.Module
    """What trains; every other part is frozen."""

    def step(self, module: nn.Module, rows: Rows) -> dict[str, Tensor]:
        """Forward and backward for one slice of a batch, through `module` (perhaps wrapped for several workers).

        Leaves the gradient of the mean loss over the slice in the parameters; returns per-sample metrics, `loss` first.
        """
        ...

    def pictures(self) -> Tensor | None:
        """The images of the last step in [0, 1], where the task makes any: to look at, logged with checkpoints."""
        ...

    def save(self, folder: Path) -> None:
        """Write `module` into `folder` as the pipeline layout has it: `text_encoder/` or `unet/`."""
        ...

    def assert_frozen(self) -> None:
        """Every part but `module` is without gradient."""
        ...


def build(recipe: Recipe) -> Task:
    """The task a recipe names, with its models loaded."""
    if recipe.task.kind == "reward_tuning":
        from craftor.tasks.reward_tuning import RewardTuningTask

        return RewardTuningTask(recipe)
    from craftor.tasks.denoising import DenoisingTask

    return DenoisingTask(recipe)
