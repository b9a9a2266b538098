"""Methods by their settings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from craftor.baselines.extenders import ByLanguageModel, Extender, by_rules
from craftor.baselines.sampling import Base, Method
from craftor.baselines.settings import BestOf, MethodSettings
from craftor_rewards import Reward


@dataclass(frozen=True)
class Extended:
    """The base's images of extended prompts, from the noise that the originals would have."""

    base: Base
    extend: Extender

    def __call__(self, prompts: Sequence[str], numbers: Sequence[int], seed: int) -> Float[Tensor, "b 3 H W"]:
        return self.base(self.extend(prompts), numbers, seed)


@dataclass(frozen=True)
class BestOfDraws:
    """The image that scores highest with its prompt, of `num` draws of which the first is the base's own."""

    base: Base
    reward: Reward
    num: int

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], numbers: Sequence[int], seed: int) -> Float[Tensor, "b 3 H W"]:
        best = self.base(prompts, numbers, seed)
        highest = self.reward(best, prompts)
        for draw in range(1, self.num):
            images = self.base(prompts, numbers, seed, draw)
            scores = self.reward(images, prompts)
            better = scores > highest
            best, highest = torch.where(better[:, None, None, None], images, best), torch.maximum(scores, highest)
        return best


def build(settings: Mapping[str, MethodSettings], base: Base, rewards: Mapping[str, Reward]) -> dict[str, Method]:
    """Every method by its name; `rewards` are the recipe's, by theirs."""
    return {name: _build(chosen, base, rewards) for name, chosen in settings.items()}


def known_to(settings: Mapping[str, MethodSettings]) -> dict[str, set[str]]:
    """By method, the metrics that it chooses by: on these its gain is no evidence."""
    return {name: {chosen.by, "total"} if isinstance(chosen, BestOf) else set() for name, chosen in settings.items()}


def _build(settings: MethodSettings, base: Base, rewards: Mapping[str, Reward]) -> Method:
    if isinstance(settings, BestOf):
        return BestOfDraws(base, rewards[settings.by], settings.num)
    if settings.extender == "micro":
        return Extended(base, by_rules)
    generate = ByLanguageModel(settings.extender, max_new_tokens=settings.max_new_tokens, seed=base.run_seed)
    return Extended(base, generate)
