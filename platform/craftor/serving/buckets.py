"""How many slots a UNet call has: one size always (strict), or the smallest of a ladder that holds the rows (fast).

The cost of a slot falls with the size of the call until the device is full; beyond that knee larger calls only make
rows wait for each other. Where it lies is measured, not assumed.
"""

from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter
from typing import Literal

import torch

from craftor.denoise import Guided, Prompt
from craftor.embed import Condition

Mode = Literal["strict", "fast"]
TOLERANCE = 0.1
"""A larger bucket must make a slot at least so much cheaper to be worth its longer step."""


def measure(
    unet: Guided, latent_shape: tuple[int, int, int], condition: Condition, sizes: Sequence[int], repeats: int = 3
) -> dict[int, float]:
    """Seconds of a UNet call by its number of slots, the least of `repeats` after one to warm up."""
    found = {}
    for size in sizes:
        seconds = []
        with torch.inference_mode():  # where its arguments are made, too: compiled code tells such tensors apart
            latents = torch.zeros((size, *latent_shape), device=unet.unet.device)
            rows = condition[torch.zeros(size, dtype=torch.long)]
            rows = replace(rows, embeds=rows.embeds.to(unet.precision))
            timesteps = torch.zeros(size, dtype=torch.long, device=latents.device)
            for _ in range(repeats + 1):
                started = perf_counter()
                unet.output(latents, Prompt(rows, rows), timesteps).flatten()[0].item()  # waits for the device
                seconds.append(perf_counter() - started)
        found[size] = min(seconds[1:])
    return found


def knee(seconds: dict[int, float], least: int = 2) -> int:
    """The smallest bucket whose slots cost within TOLERANCE of the cheapest there are; at least 2, for guidance."""
    per_slot = {size: call / size for size, call in seconds.items() if size >= least}
    return min(size for size, cost in per_slot.items() if cost <= (1 + TOLERANCE) * min(per_slot.values()))


def ladder(mode: Mode, capacity: int) -> tuple[int, ...]:
    """The sizes a call may have: the capacity alone, or 1 and the powers of two up to it."""
    return (
        (capacity,)
        if mode == "strict"
        else (*(2**k for k in range(capacity.bit_length()) if 2**k < capacity), capacity)
    )


def tried(mode: Mode, bucket: int | None, most: int) -> tuple[int, ...]:
    """What is worth measuring: the sizes that calls will have where `bucket` says so, else all up to `most`."""
    return ladder("fast", most) if bucket is None else ladder(mode, bucket)


def smallest(sizes: Sequence[int], slots: int) -> int:
    """The smallest bucket that holds so many slots."""
    return min(size for size in sizes if size >= slots)
