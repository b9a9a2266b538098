"""Images -> scores and dL/d(images): reward by reward, so that only one reward's graph is alive at a time."""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from craftor import objective
from craftor.composition import Composition
from craftor.diffuser import assert_frozen
from craftor.guards import Guards
from craftor.locate import locate
from craftor.sampled_settings import Sampled
from craftor.task_settings import Tuning
from craftor_rewards import Reward, build

Scored = tuple[Float[Tensor, " b"], Float[Tensor, "b 3 H W"] | None]
"""Scores without graph, and the gradient of `(cotangent * scores).sum()` with respect to the images; None if that was
not asked for."""
ScoreAndGradient = Callable[[Float[Tensor, "b 3 H W"], Sequence[str], Float[Tensor, " b"] | None], Callable[[], Scored]]
"""(images, prompts, cotangent) -> a call that waits for the result: rewards elsewhere may compute meanwhile. Without a
cotangent only the scores are wanted. A sample's gradient depends on that sample's cotangent alone."""


class Elsewhere(Protocol):
    """A reward that other processes compute: a `ScoreAndGradient` that also says whether it has a gradient."""

    differentiable: bool

    def __call__(
        self, images: Float[Tensor, "b 3 H W"], prompts: Sequence[str], cotangent: Float[Tensor, " b"] | None
    ) -> Callable[[], Scored]: ...


def inline(reward: Reward) -> ScoreAndGradient:
    """A reward in this process, computed when its result is asked for."""

    def begin(images: Tensor, prompts: Sequence[str], cotangent: Tensor | None) -> Callable[[], Scored]:
        def compute() -> Scored:
            if cotangent is None:
                with torch.no_grad():
                    return reward(images.detach(), prompts), None
            leaf = images.detach().requires_grad_()
            scores = reward(leaf, prompts)
            (gradient,) = torch.autograd.grad(scores, leaf, cotangent.to(scores.dtype))
            return scores.detach(), gradient

        return compute

    return begin


class Scoring:
    """The rewards of a recipe: those that train, composed, and those that only watch.

    `elsewhere` has those whose placement is not inline, `own` those that a task makes itself, for they know more than
    images and prompts. Raises ValueError for a reward that is to train and has no gradient.
    """

    def __init__(
        self,
        settings: Tuning,
        guards: Guards,
        device: torch.device,
        elsewhere: Mapping[str, Elsewhere],
        own: Mapping[str, Reward] | None = None,
    ) -> None:
        used = {name: reward for name, reward in settings.rewards.items() if reward.in_training}
        here = {name: reward for name, reward in used.items() if reward.placement == "inline"}
        assert used.keys() <= here.keys() | elsewhere.keys(), "a reward is placed on actors that nobody has started"
        built = {name: build(reward.kind, locate(reward.weights), **reward.options) for name, reward in here.items()}
        built |= own or {}
        self.watching = {name: reward.every for name, reward in used.items() if reward.every}
        self.rewards = {name: reward for name, reward in built.items() if name not in self.watching}
        self.weights = settings.factors
        for name in self.weights:
            differentiable = (built[name] if name in built else elsewhere[name]).differentiable
            if not differentiable and not isinstance(settings, Sampled):
                raise ValueError(
                    f"task.rewards.{name}: not differentiable, so it cannot be backpropagated; allowed: "
                    'task.kind = "policy_gradient" or "reward_weighted", which need no gradient, or '
                    "evaluation_only = true"
                )
        for reward in built.values():
            if isinstance(reward, nn.Module):
                reward.to(device)
        self.guards, self.composition = guards, Composition(settings.composition, self.weights)
        self.built = built
        self.readers = [reward for reward in built.values() if hasattr(reward, "truncated")]
        self.calls: dict[str, ScoreAndGradient] = {
            **{name: elsewhere[name] for name in used if name not in built},
            **{name: inline(reward) for name, reward in built.items()},
        }

    def __call__(
        self, images: Float[Tensor, "b 3 H W"], prompts: list[str], share: float, step: int = 0
    ) -> tuple[dict[str, Tensor], Float[Tensor, "b 3 H W"]]:
        """Per-sample metrics, and the gradient of `share` times the batch's mean loss with respect to the images.

        The metrics are each reward's scores by its name, how their gradients agree, and what is due every so many
        steps at optimiser step `step`, counted from 0.
        """
        factors = self.composition.factors()
        cotangents: dict[str, Tensor | None] = {
            name: objective.cotangent(factor, share, images) for name, factor in factors.items()
        }
        due = {name: None for name, every in self.watching.items() if step % every == 0}
        scored = self._score(images, prompts, {**cotangents, **due})
        metrics = {name: scores for name, (scores, _) in scored.items()}
        gradients = {name: gradient for name, (_, gradient) in scored.items() if gradient is not None}
        if self.readers:
            metrics["truncated"] = self.truncated(prompts).to(images.device)
        metrics |= self.composition.agreement(gradients, step=step, share=share)
        if self.guards.sharpness_every and step % self.guards.sharpness_every == 0:
            metrics["sharpness"] = self.sharpness(images, prompts, metrics, gradients)
        return metrics, self.composition.combine(gradients)

    def begin(
        self, images: Float[Tensor, "b 3 H W"], prompts: list[str], step: int = 0
    ) -> Callable[[], dict[str, Tensor]]:
        """Ask every reward for scores alone; the result waits for them. Rewards elsewhere may compute meanwhile."""
        due = [name for name, every in self.watching.items() if step % every == 0]
        begun = {name: self.calls[name](images, prompts, None) for name in (*self.weights, *due)}

        def wait() -> dict[str, Tensor]:
            metrics = {name: answer()[0] for name, answer in begun.items()}
            return {**metrics, "truncated": self.truncated(prompts).to(images.device)} if self.readers else metrics

        return wait

    def total(self, scores: Mapping[str, Float[Tensor, " b"]]) -> Float[Tensor, " b"]:
        """The objective of each image, higher is better."""
        return self.composition.total(scores)

    def sharpness(
        self, images: Tensor, prompts: list[str], scores: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
    ) -> Float[Tensor, " b"]:
        """What the objective loses by the worst small change of each image, to first order; one more call per reward.

        The change goes along the loss's gradient, its root mean square `sharpness_radius`. Where a reward is exploited
        rather than earned, it tends to be sharp (Kim & Sim 2026, "Reward Sharpness-Aware Fine-Tuning").
        """
        uphill = reduce(torch.add, gradients.values()).flatten(1)
        unit = uphill / uphill.square().mean(1, keepdim=True).sqrt().clamp(min=1e-30)
        worst = (images.detach() + self.guards.sharpness_radius * unit.view_as(images)).clamp(0, 1)
        there = {name: score for name, (score, _) in self._score(worst, prompts, dict.fromkeys(self.weights)).items()}
        return self.total(scores) - self.total(there)

    def truncated(self, prompts: list[str]) -> Float[Tensor, " b"]:
        """1 for each prompt that is longer than some reward here reads, so that its end counts for nothing there."""
        return torch.tensor([reward.truncated(prompts) for reward in self.readers]).any(dim=0).float()

    def assert_frozen(self) -> None:
        for name, reward in self.built.items():
            if isinstance(reward, nn.Module):
                assert_frozen(reward, name)

    def _score(self, images: Tensor, prompts: list[str], cotangents: Mapping[str, Tensor | None]) -> dict[str, Scored]:
        """Ask every reward before waiting for the first."""
        begun = {name: self.calls[name](images, prompts, cotangent) for name, cotangent in cotangents.items()}
        return {name: wait() for name, wait in begun.items()}
