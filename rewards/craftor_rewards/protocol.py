"""What a reward is: images in [0, 1] and their prompts -> one score each, higher is better."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

Range = tuple[float, float] | str


@runtime_checkable
class Reward(Protocol):
    """Frozen and deterministic; score i depends on image i and prompt i alone. This is all that a class must have."""

    differentiable: bool
    """Whether gradient flows from the scores to the pixels."""
    needs_prompt: bool
    """Whether prompts change the scores; where they do not, the strings are ignored."""

    def __call__(self, images: Float[Tensor, "b 3 H W"], prompts: Sequence[str]) -> Float[Tensor, " b"]: ...


@dataclass(frozen=True)
class Declaration:
    """What a reward says of itself; every kind of this library says all of it."""

    differentiable: bool
    needs_prompt: bool
    input_size: int | None
    """Pixels per side that the model sees; None where images are scored at their own size."""
    fit: str
    """How an image that is not square is made so: a `fit` of `preprocess`, or "none"."""
    score_range: Range
    """Lowest and highest score, or words where nothing bounds it."""


def declaration(reward: Reward) -> Declaration:
    """`input_size`, `fit` and `score_range` may be missing from a class of the user's own."""
    return Declaration(
        differentiable=reward.differentiable,
        needs_prompt=reward.needs_prompt,
        input_size=getattr(reward, "input_size", None),
        fit=getattr(reward, "fit", "none"),
        score_range=getattr(reward, "score_range", "not declared"),
    )


def check_reward(reward: object, name: str) -> Reward:
    """The object itself if it keeps the protocol; else ValueError naming what it lacks."""
    lacking = [f"{key} = True or False" for key in ("differentiable", "needs_prompt") if not _is_bool(reward, key)]
    if not callable(reward) or isinstance(reward, type):
        lacking.append("__call__(images, prompts), or forward of an nn.Module")
    elif not _takes_two(reward):
        lacking.append(f"a call with (images, prompts); it has {_signature(reward)}")
    if lacking:
        raise ValueError(f"reward '{name}' ({type(reward).__name__}) lacks {'; '.join(lacking)}")
    assert isinstance(reward, Reward)
    return reward


def check_inputs(images: Tensor, prompts: Sequence[str], *, needs_prompt: bool = True) -> None:
    """Shape, type, matching numbers and prompts that say something; raises ValueError.

    The pixels are not read, for that would wait for the device at every step: `check_range` does.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images have shape {tuple(images.shape)}; expected (batch, 3, height, width)")
    if not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}; expected floating point in [0, 1]")
    if isinstance(prompts, str):
        raise ValueError(f"prompts is the string {prompts!r}; expected a sequence of strings, one per image")
    if len(prompts) != len(images):
        raise ValueError(f"{len(images)} images but {len(prompts)} prompts; expected one prompt per image")
    if needs_prompt:
        for i, prompt in enumerate(prompts):
            if not isinstance(prompt, str) or not prompt.strip():
                raise ValueError(f"prompt {i} is {prompt!r}; expected text: this reward compares images with prompts")


def check_range(images: Tensor) -> None:
    """Refuse images that are not in [0, 1]: NaN, [-1, 1] or 0 to 255. Reads the pixels, so not for every step.

    Raises ValueError with the smallest and the largest value.
    """
    if not images.isfinite().all():
        bad = (~images.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
        raise ValueError(f"images {bad} of the batch have pixels that are NaN or infinite; expected values in [0, 1]")
    low, high = (bound.item() for bound in torch.aminmax(images))
    if low < 0 or high > 1:
        hint = "; these look like [-1, 1]: use (x + 1) / 2" if -1 <= low < 0 and high <= 1 else ""
        hint = "; these look like 0 to 255: divide by 255" if low >= 0 and high > 2 else hint
        raise ValueError(f"images range from {low:.4g} to {high:.4g}; expected [0, 1]{hint}")


def check_scores(scores: Tensor, num_images: int, name: str) -> None:
    """One finite number per image; raises ValueError naming the reward and the images without one."""
    if not isinstance(scores, Tensor) or scores.shape != (num_images,) or not scores.is_floating_point():
        shape = f"{scores.dtype} of shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else repr(scores)
        raise ValueError(f"reward '{name}' returned {shape}; expected floating point of shape ({num_images},)")
    if not scores.isfinite().all():
        bad = (~scores.isfinite()).nonzero().flatten().tolist()
        raise ValueError(f"reward '{name}' returned NaN or infinity for images {bad} of the batch")


def _is_bool(reward: object, key: str) -> bool:
    return isinstance(getattr(reward, key, None), bool)


def _signature(reward: object) -> inspect.Signature:
    """A module's own `__call__` takes anything; what counts is its `forward`."""
    assert callable(reward)
    return inspect.signature(reward.forward if isinstance(reward, torch.nn.Module) else reward)


def _takes_two(reward: object) -> bool:
    try:
        _signature(reward).bind("images", "prompts")
    except TypeError:
        return False
    return True
