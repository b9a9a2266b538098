"""Images -> scores and dL/d(images): reward by reward, so that only one reward's graph is alive at a time."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from craftor import objective
from craftor.diffuser import assert_frozen
from craftor.locate import locate
from craftor.task_settings import Reward as RewardSettings
from craftor_rewards import build


class Scoring:
    """The trained rewards of a recipe with their weights. Raises ValueError for one that has no gradient."""

    def __init__(self, settings: Mapping[str, RewardSettings], device: torch.device) -> None:
        trained = {name: reward for name, reward in settings.items() if not reward.evaluation_only}
        self.rewards = {name: build(reward.kind, locate(reward.weights)) for name, reward in trained.items()}
        self.weights = {name: reward.weight for name, reward in trained.items()}
        for name, reward in self.rewards.items():
            if not reward.differentiable:
                raise ValueError(f"task.rewards.{name}: not differentiable, so it cannot be backpropagated")
            if isinstance(reward, nn.Module):
                reward.to(device)

    def __call__(
        self, images: Float[Tensor, "b 3 H W"], prompts: list[str], share: float
    ) -> tuple[dict[str, Tensor], Float[Tensor, "b 3 H W"]]:
        """Per-sample scores, and the gradient of `share` times the batch's mean loss with respect to the images."""
        leaf = images.detach().requires_grad_()
        scores = {}
        for name, reward in self.rewards.items():
            score = reward(leaf, prompts)
            (share * objective.loss(score, self.weights[name])).backward()
            scores[name] = score.detach()
        assert leaf.grad is not None
        return scores, leaf.grad

    def assert_frozen(self) -> None:
        for name, reward in self.rewards.items():
            if isinstance(reward, nn.Module):
                assert_frozen(reward, name)
