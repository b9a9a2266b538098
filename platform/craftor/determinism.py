"""The same numbers again: PyTorch's deterministic kernels, as far as a device has them."""

import os

import torch


def prefer_deterministic(device: torch.device) -> None:
    """All on a CPU; on CUDA a warning where there is none, and so for the backward pass of every reward's resizing.

    An error there would end each run on a GPU at its first backward pass. To be called before CUDA's first use.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS wants for it
    torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
