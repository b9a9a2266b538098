"""Rewards by name. `build("clip_score", folder)` gives a frozen, differentiable `Reward`."""

from collections.abc import Callable
from importlib import import_module
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import torch

from craftor_rewards.aesthetic import Aesthetic
from craftor_rewards.catalogue import CATALOGUE
from craftor_rewards.clip_score import ClipScore
from craftor_rewards.compressibility import Compressibility
from craftor_rewards.features import DinoFeatures, identity, pairwise_diversity
from craftor_rewards.hps import Hps
from craftor_rewards.http_scorer import HttpScorer
from craftor_rewards.image_reward import ImageReward
from craftor_rewards.pick_score import PickScore
from craftor_rewards.protocol import Declaration, Reward, check_range, check_reward, declaration

REWARDS: dict[str, Callable[..., Reward]] = {
    "clip_score": ClipScore,
    "aesthetic": Aesthetic,
    "pick_score": PickScore,
    "hps": Hps,
    "image_reward": ImageReward,
    "compressibility": Compressibility,
    "http": HttpScorer,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Precisions by the names that recipes have for them."""
__all__ = [
    "CATALOGUE",
    "DTYPES",
    "REWARDS",
    "Aesthetic",
    "ClipScore",
    "Compressibility",
    "Declaration",
    "DinoFeatures",
    "Hps",
    "HttpScorer",
    "ImageReward",
    "PickScore",
    "Reward",
    "build",
    "check_range",
    "declaration",
    "identity",
    "pairwise_diversity",
]


def build(kind: str, weights: str | Path, **options: Any) -> Reward:
    """A reward of `REWARDS`, or of the user's own as "module:attr", with its weights.

    weights: a folder or file, a short name of `CATALOGUE`, or a Hugging Face repository; whatever a user's own class
        makes of it. options go to the class: `dtype` ("fp32", "bf16", "fp16" or PyTorch's own) and `checkpoint` for
        those made of CLIPs.

    Raises ValueError for an unknown kind and for an object without the protocol, FileNotFoundError for weights that
    are not on this machine and cannot be fetched.
    """
    if ":" in kind:
        return check_reward(_make(_attribute(kind), kind, weights, options), kind)
    if kind not in REWARDS:
        raise ValueError(f"unknown reward '{kind}'; available: {', '.join(REWARDS)}, or 'module:attr' of your own")
    reward: Reward = _make(REWARDS[kind], kind, weights, options)
    return reward


def _make(constructor: Callable[..., Any], kind: str, weights: str | Path, options: dict[str, Any]) -> Any:
    """Raises ValueError for options that the class does not know, and for a dtype by a name of its own."""
    known = signature(constructor).parameters
    if not any(parameter.kind == Parameter.VAR_KEYWORD for parameter in known.values()):
        allowed = list(known)[1:]
        if unknown := [name for name in options if name not in allowed]:
            raise ValueError(f"reward '{kind}' has no option '{unknown[0]}'; it takes: {', '.join(allowed) or 'none'}")
    if isinstance(name := options.get("dtype"), str):
        if name not in DTYPES:
            raise ValueError(f"reward '{kind}': option dtype = '{name}'; allowed: {', '.join(DTYPES)}")
        options = {**options, "dtype": DTYPES[name]}
    return constructor(weights, **options)


def _attribute(kind: str) -> Callable[..., object]:
    module_name, _, name = kind.partition(":")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there; something that it imports is not
        raise ValueError(f"reward '{kind}': no module '{module_name}' in this Python's path") from error
    if not callable(getattr(module, name, None)):
        found = ", ".join(n for n in vars(module) if not n.startswith("_") and callable(getattr(module, n)))
        raise ValueError(f"reward '{kind}': '{module.__file__}' has no class or function '{name}'; it has: {found}")
    return getattr(module, name)
