"""What training workers tell each other: gradients, per-sample metrics, what to do next."""

import torch
from torch import Tensor, nn

from craftor.interruption import Next

BUCKET = 25_000_000


def average_gradients(parameters: list[nn.Parameter], world_size: int) -> None:
    """Mean of every gradient over the workers, in flat messages of some 100 MB."""
    if world_size == 1:
        return
    bucket: list[Tensor] = []
    for i, parameter in enumerate(parameters):
        assert parameter.grad is not None, "a trained parameter without gradient"
        bucket.append(parameter.grad)
        if sum(gradient.numel() for gradient in bucket) >= BUCKET or i == len(parameters) - 1:
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            torch.distributed.all_reduce(flat)
            mean = (flat / world_size).split([gradient.numel() for gradient in bucket])
            for gradient, part in zip(bucket, mean, strict=True):
                gradient.copy_(part.view_as(gradient))
            bucket = []


def gather(metrics: dict[str, Tensor], shares: list[int]) -> dict[str, Tensor]:
    """Per-sample metrics of the whole global batch, in the order of its slots, on every worker.

    `shares` are the workers' numbers of samples; where they differ, by one at most, the smaller are padded on the way.
    """
    if len(shares) == 1:
        return metrics
    rows = torch.cat([values.reshape(len(values), -1) for values in metrics.values()], dim=1)
    padded = nn.functional.pad(rows, (0, 0, 0, max(shares) - len(rows)))
    parts = [torch.empty_like(padded) for _ in shares]
    torch.distributed.all_gather(parts, padded)
    whole = torch.cat([part[:share] for part, share in zip(parts, shares, strict=True)])
    columns = whole.split([values[0].numel() for values in metrics.values()], dim=1)
    return {name: c.reshape(-1, *v.shape[1:]) for (name, v), c in zip(metrics.items(), columns, strict=True)}


def agreed(decision: Next, world_size: int) -> Next:
    """Worker 0's decision, on every worker."""
    return Next(first_says(decision, world_size))


def first_says(number: int, world_size: int) -> int:
    """Worker 0's number, on every worker."""
    if world_size == 1:
        return int(number)
    nccl = torch.distributed.get_backend() == "nccl"
    message = torch.tensor(int(number), device=torch.cuda.current_device() if nccl else "cpu")
    torch.distributed.broadcast(message, src=0)
    return int(message.item())
