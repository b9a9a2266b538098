"""Linear layers of a CPU's UNet through oneDNN, whose matrix products use AVX-512 on every maker's processors.

PyTorch's own go through MKL, which on AMD processors runs at about half the speed, and so do 1x1 convolutions of small
batches. Same numbers to rounding, forth and back; what oneDNN would slow down (small products), and what it is not
asked for here (other precisions, devices, compiled code), stays PyTorch's.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

SMALL = 3_000_000
"""Multiplications below which a call costs more than it saves."""


def use_onednn(module: nn.Module) -> None:
    """Let a module's linear layers and 1x1 convolutions, whose weights stay as they are, multiply through oneDNN."""
    if not torch.backends.mkldnn.is_available():
        return
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = Linear
        elif type(layer) is nn.Conv2d and _is_pointwise(layer):
            layer.__class__ = Pointwise


def _is_pointwise(layer: nn.Conv2d) -> bool:
    sizes = (layer.kernel_size, layer.stride, layer.dilation, layer.groups)
    return sizes == ((1, 1), (1, 1), (1, 1), 1) and layer.padding == (0, 0)


class Linear(nn.Linear):
    """`nn.Linear`, its class changed in place."""

    def forward(self, rows: Tensor) -> Tensor:
        if not _gains(rows, self.out_features):
            return F.linear(rows, self.weight, self.bias)
        return _product(rows, self.weight, self.bias)


class Pointwise(nn.Conv2d):
    """A 1x1 `nn.Conv2d` as what it is, a linear layer on channels; in channels_last nothing is copied."""

    def forward(self, images: Tensor) -> Tensor:
        if not _gains(images, self.out_channels):
            return super().forward(images)
        return _product(images.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def _gains(rows: Tensor, num_outputs: int) -> bool:
    return (
        rows.numel() * num_outputs >= SMALL  # first: most calls of a small model end here
        and rows.dtype == torch.float32
        and rows.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


_KERNEL: Any = torch.ops.mkldnn._linear_pointwise if torch.backends.mkldnn.is_available() else None
_CALL: Any = _KERNEL.default if _KERNEL else None


def _multiply(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`rows @ weight.T + bias`."""
    return _CALL(rows, weight, bias, "none", [], "")


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return (_Product.apply if torch.is_grad_enabled() else _multiply)(rows, weight, bias)


class _Product(torch.autograd.Function):
    """`F.linear` and its gradient, three products of one kind."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return _multiply(rows, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        by_rows, by_weight, by_bias = ctx.needs_input_grad
        flat = gradient.flatten(0, -2)
        return (
            _multiply(gradient, weight.t()) if by_rows else None,
            _multiply(flat.t(), rows.flatten(0, -2).t()) if by_weight else None,
            flat.sum(0) if by_bias else None,
        )


def _flops(rows: Sequence[int], weight: Sequence[int], *_: object, **_options: object) -> int:
    return 2 * math.prod(rows) * weight[0]


FLOPS: dict[Any, Callable[..., int]] = {_KERNEL: _flops} if _KERNEL else {}
"""For `torch.utils.flop_counter`, which does not know these products: operations by the shapes of their factors."""
