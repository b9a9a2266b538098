"""What a device can do, by the name that `craftor plan --gpu` takes: vendors' figures, dense, and a price to check."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """Peaks per second, and what an hour of one costs where it is rented on demand."""

    memory_gib: float
    half: float
    """Floating-point operations in bfloat16 (float16 where there is none) with float32 sums."""
    single: float
    """In float32, without tensor cores."""
    bandwidth: float
    """Bytes."""
    dollars_per_hour: float
    """Of 2026, rounded; `--price` has yours."""
    bfloat16: bool = True
    """Whether it multiplies it."""


DEVICES = {
    "T4-16G": Device(15, 65e12, 8.1e12, 320e9, 0.5, bfloat16=False),
    "L4-24G": Device(22, 121e12, 30.3e12, 300e9, 0.8),
    "A10G-24G": Device(22, 70e12, 31.2e12, 600e9, 1.0),
    "RTX4090-24G": Device(23, 165e12, 82.6e12, 1008e9, 0.6),
    "L40S-48G": Device(44, 362e12, 91.6e12, 864e9, 1.6),
    "A100-40G": Device(39, 312e12, 19.5e12, 1555e9, 1.8),
    "A100-80G": Device(79, 312e12, 19.5e12, 2039e9, 2.2),
    "H100-80G": Device(79, 989e12, 67e12, 3350e9, 3.5),
    "H200-141G": Device(139, 989e12, 67e12, 4800e9, 4.2),
}
