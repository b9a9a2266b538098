"""The arithmetic that a network computes in: what a recipe names, or the fastest that the device has."""

import torch

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = {dtype: name for name, dtype in PRECISIONS.items()}


def dtype_of(precision: str, device: torch.device) -> torch.dtype:
    """`auto` is bf16 where the device multiplies it, else fp32; any other name is taken at its word."""
    if precision == "auto":
        precision = "bf16" if multiplies_bf16(device) else "fp32"
    return PRECISIONS[precision]


def multiplies_bf16(device: torch.device) -> bool:
    """Whether there are kernels for it: an x86 CPU without AVX-512 emulates it, and is faster in float32 by far."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def fast_on_cpu() -> torch.autocast:
    """bf16 in the block, where this CPU multiplies it."""
    return torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bf16(torch.device("cpu")))
