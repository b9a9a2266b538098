"""Operations and bytes of a call, counted and not timed: torch's counter, taught what it does not know."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from craftor.onednn import FLOPS

ATTENTION_FLOPS: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda gradient, q, k, v, *_, **__: (
        sdpa_backward_flop_count(gradient, q, k, v)
    ),
}
"""torch's counter knows the fused kernels of GPUs alone."""


@dataclass(frozen=True)
class Part:
    """One sample through one module: operations forth and back, bytes its graph keeps, its parameters."""

    forward: float
    backward: float
    graph_bytes: float
    parameters: int


class Whole:
    """In place of torch's tracker of modules, whose hooks refuse gradients asked for at a module's own input."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


def counting() -> FlopCounterMode:
    """A counter of all operations in its block, whatever module they are in."""
    counter: Any = FlopCounterMode(display=False, custom_mapping={**FLOPS, **ATTENTION_FLOPS})
    counter.mod_tracker = Whole()
    return counter


def measure(module: nn.Module, run: Callable[[], Tensor]) -> Part:
    """Count a call forth and back; storages are told apart by identity, for on the meta device they have no address."""
    own = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    held: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            held[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with counting() as counter:
            output = run()
        forward = counter.get_total_flops()
    size = sum(storage.nbytes() for storage in held.values())
    backward = 0
    if output.requires_grad:
        with counting() as counter:
            output.sum().backward()
        backward = counter.get_total_flops()
    return Part(forward, backward, size, sum(parameter.numel() for parameter in module.parameters()))
