"""What a reward is: images in [0, 1] and their prompts -> one score each, higher is better."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor


@runtime_checkable
class Reward(Protocol):
    """Frozen and deterministic; score i depends on image i and prompt i alone."""

    differentiable: bool
    """Whether gradient flows from the scores to the pixels."""
    needs_prompt: bool
    """Whether prompts change the scores; where they do not, the strings are ignored."""

    def __call__(self, images: Float[Tensor, "b 3 H W"], prompts: Sequence[str]) -> Float[Tensor, " b"]: ...


def check_inputs(images: Tensor, prompts: Sequence[str]) -> None:
    """Shape, type and matching numbers; the range is not read, for that would wait for the device at every step."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images have shape {tuple(images.shape)}; expected (batch, 3, height, width)")
    if not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}; expected floating point in [0, 1]")
    if isinstance(prompts, str):
        raise ValueError(f"prompts is the string {prompts!r}; expected a sequence of strings, one per image")
    if len(prompts) != len(images):
        raise ValueError(f"{len(images)} images but {len(prompts)} prompts; expected one prompt per image")
