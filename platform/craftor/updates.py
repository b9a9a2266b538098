"""What goes with an optimiser step: the learning rate's course, the moving average, the distance from the start."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from craftor import checkpoint
from craftor.recipe import Optimizer
from craftor.sharding import local, sum_of_squares


def lr_factor(settings: Optimizer, step: int, num_steps: int) -> float:
    """Linear warm-up, constant, then a cosine to zero over what follows `cosine_from`."""
    warmup = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
    done = step / num_steps
    if done <= settings.cosine_from:
        return warmup
    falling = (done - settings.cosine_from) / (1 - settings.cosine_from)
    return warmup * 0.5 * (1 + math.cos(math.pi * falling))


@torch.no_grad()
def update_average(average: dict[str, Tensor] | None, module: nn.Module, decay: float | None, step: int) -> None:
    """Exponential moving average whose decay grows from 0 to `decay`, so that the start is forgotten."""
    if average is None or decay is None:
        return
    weight = 1 - min(decay, (1 + step) / (10 + step))
    for name, parameter in checkpoint.trained(module).items():
        local(average[name]).lerp_(local(parameter), weight)


@torch.no_grad()
def drift(module: nn.Module, original: dict[str, Tensor]) -> float:
    """Relative distance of the weights from where they started; all workers call it together."""
    moved = sum_of_squares(p - original[name] for name, p in checkpoint.trained(module).items())
    return math.sqrt(moved / sum_of_squares(original.values()))


@contextmanager
def averaged(module: nn.Module, average: dict[str, Tensor] | None) -> Iterator[None]:
    """The averaged weights for the time of the block, where an average is kept."""
    current = {name: p.detach().clone() for name, p in checkpoint.trained(module).items()}
    module.load_state_dict(average or current, strict=False)
    try:
        yield
    finally:
        module.load_state_dict(current, strict=False)
