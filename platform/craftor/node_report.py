"""What one node has, as it says itself: versions, devices, attention kernels, arithmetic."""

import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from craftor import __version__
from craftor.precision import multiplies_bf16

PACKAGES = ("ray", "torch", "diffusers", "transformers", "mlflow", "numpy", "safetensors", "pyarrow")


def report() -> dict[str, Any]:
    """What a node has: versions, devices, attention kernels with their error against plain attention, arithmetic."""
    found = {"python": platform.python_version(), "craftor": __version__}
    for package in PACKAGES:
        try:
            found[package] = version(package).split("+")[0]
        except PackageNotFoundError:
            found[package] = "missing"
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    kinds = ("cpu", "cuda") if devices else ("cpu",)
    return {
        "versions": found,
        "devices": devices,
        "kernels": kernels(kinds[-1]),
        "bf16": {kind: multiplies_bf16(torch.device(kind)) for kind in kinds},
    }


def kernels(device: str) -> dict[str, float]:
    """Largest error of each attention kernel that runs here, against softmax(q k / sqrt(d)) v in float32."""
    query, key, value = torch.randn(3, 2, 4, 64, 40, device=device)
    weights = torch.softmax(query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5, dim=-1)
    expected = weights @ value
    found = {"sdpa": _error(torch.nn.functional.scaled_dot_product_attention(query, key, value), expected)}
    if device == "cuda" and find_spec("xformers"):
        from xformers.ops import memory_efficient_attention  # type: ignore[import-not-found]  # of the gpu extra

        swapped = [tensor.transpose(1, 2) for tensor in (query, key, value)]
        found["xformers"] = _error(memory_efficient_attention(*swapped).transpose(1, 2), expected)
    return found


def _error(found: Tensor, expected: Tensor) -> float:
    return (found - expected).abs().max().item()
