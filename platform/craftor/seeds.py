"""Every random number follows from (run seed, sample index, purpose), never from workers, order or restarts."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def generator(seed: int, index: int, purpose: str) -> torch.Generator:
    """A CPU generator of its own for one sample and one purpose."""
    digest = hashlib.blake2b(f"{seed}/{index}/{purpose}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def normal(seed: int, indices: Sequence[int], purpose: str, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise `(len(indices), *shape)`, row by row from each sample's own generator."""
    return torch.stack([torch.randn(shape, generator=generator(seed, i, purpose)) for i in indices])


def uniform(seed: int, indices: Sequence[int], purpose: str) -> Tensor:
    """One number in [0, 1) per sample."""
    return torch.stack([torch.rand((), generator=generator(seed, i, purpose)) for i in indices])
