"""The `[task]` sections that learn from the scores of several samples of a prompt, not from a gradient of them."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from craftor.rollout import Window
from craftor.task_settings import RewardTuning

_FIXED = ("preset", "last", "first", "start", "stop", "steps", "of", "outside", "null")
"""Keys of a window whose steps are the same for every sample."""
_ABOUT_GRADIENTS = ("share", "cosine", "norm")


class Sampled(RewardTuning):
    """Make several images of each prompt, score them, and learn from how they compare: rewards need no gradient."""

    needs_clip: ClassVar[bool] = False
    own_metrics: ClassVar[tuple[str, ...]] = ()

    window: Window = Window(first=1, of=1, outside="tuned")
    """All steps; of a window's keys, those whose steps are the same for every sample."""
    samples_per_prompt: int = Field(4, ge=1)
    """`run.batch_size` counts prompts; rewards see so many times more images."""

    def metrics(self) -> tuple[str, ...]:
        return (*(name for name in super().metrics() if name.split("/")[0] not in _ABOUT_GRADIENTS), *self.own_metrics)

    @model_validator(mode="after")
    def _scores_are_enough(self) -> "Sampled":
        given = [key for key, info in Window.model_fields.items() if getattr(self.window, key) != info.default]
        if other := [key for key in given if key not in _FIXED]:
            raise ValueError(f"window: {other[0]} is for gradients of rewards; allowed here: {', '.join(_FIXED)}")
        if self.shown is not None:
            raise ValueError(f'shown: not with task.kind = "{self.kind}"; allowed: task.kind = "reward_tuning"')
        if self.prefix.mode != "worker":
            raise ValueError(f'prefix.mode = "{self.prefix.mode}" holds one sample a prompt; allowed: worker')
        if self.composition.weights != "given" or self.composition.conflicts != "sum":
            raise ValueError("composition: equal_shares and pcgrad need the rewards' gradients; leave them out")
        if taken := [name for name in self.rewards if name in self.own_metrics]:
            raise ValueError(f"a reward is named {taken[0]!r}, which is another metric's name; choose another")
        return self


class PolicyGradient(Sampled):
    """Reinforcement learning (DDPO, Black et al. 2023): raise the density of the samples that scored above others.

    The window's steps are drawn from Gaussians and learn; the steps outside are DDIM's.
    """

    own_metrics: ClassVar[tuple[str, ...]] = ("clipped", "kl")
    kind: Literal["policy_gradient"]  # type: ignore[assignment]  # the tag of the union of tasks
    eta: float = Field(1.0, gt=0, le=1)
    """Noise of each step, as a share of what makes sampling the reverse of the forward process."""
    same_noise: bool = False
    """Start a prompt's samples from one noise: they then differ by the window's steps alone, which leaves less to
    average, and what comes before the window is computed once (DanceGRPO, Xue et al. 2025)."""
    advantage: Literal["group", "prompt"] = "group"
    """A score less the mean, over the deviation: of the prompt's samples in this batch (GRPO), or of all its samples in
    the batches before (DDPO)."""
    min_count: int = Field(16, ge=2)
    """With "prompt": samples of a prompt after which its own statistics are used, and all prompts' no longer."""
    memory: int = Field(32, ge=2)
    """With "prompt": over how many of the last samples statistics run, roughly."""
    advantage_clip: float = Field(5.0, gt=0)
    updates_per_rollout: int = Field(1, ge=1)
    """Optimiser steps for which the policy that samples stays as it is; importance ratios make up for the difference.
    Each step has a batch of its own. A run that is stopped in between goes on sampling from what it has learnt."""
    clip_range: float = Field(0.2, gt=0)
    """How far from 1 a ratio of densities still counts; it is 1 with one update per rollout."""
    kl_weight: float = Field(0.0, ge=0)
    """Weight of the divergence from the untrained model, summed over a sample's steps (DPOK, Fan et al. 2023)."""

    def metrics(self) -> tuple[str, ...]:
        return tuple(name for name in super().metrics() if name != "kl" or self.kl_weight)

    @model_validator(mode="after")
    def _policy_is_consistent(self) -> "PolicyGradient":
        if self.rollout.solver == "dpm_solver_2m":
            raise ValueError('rollout.solver = "dpm_solver_2m" has no stochastic steps; allowed: ddim, euler')
        if self.advantage == "group" and self.samples_per_prompt < 2:
            raise ValueError('advantage = "group" compares a prompt\'s samples; allowed: samples_per_prompt >= 2')
        return self


class RewardWeighted(Sampled):
    """Learn to denoise a prompt's better images, without any gradient through the chain (reward-weighted regression).

    The untrained model makes the images, once. At every step one of a prompt's is chosen, with probability
    softmax(total / temperature), and what trains learns to denoise it from the noise level of a step of the window, in
    whose steps it is to be used. Guidance's empty prompt does not train.
    """

    own_metrics: ClassVar[tuple[str, ...]] = ("chosen", "gap")
    kind: Literal["reward_weighted"]  # type: ignore[assignment]  # the tag of the union of tasks
    samples_per_prompt: int = Field(4, ge=2)
    temperature: float = Field(gt=0)
    """In units of the weighted sum of the rewards: the lower, the more often it is the best; the higher, the more alike
    what is learnt stays to what the untrained model makes."""
    prompts_at_once: int = Field(4, ge=1)
    """Prompts whose images are made together; of one, where that is all that fits in memory."""
    drawn_in: int | None = Field(None, ge=1, le=1000)
    """Denoising steps in which the images are made, by default the rollout's: fewer take less time."""

    @model_validator(mode="after")
    def _images_are_made_once(self) -> "RewardWeighted":
        if self.composition.moves:
            raise ValueError("composition.normalise: images are scored once, before there is a spread; leave it out")
        if watching := [name for name, reward in self.rewards.items() if reward.every]:
            raise ValueError(f"rewards.{watching[0]}.every: images are made once, and do not change; leave it out")
        if self.window.null != "tuned":
            raise ValueError(f'window.null = "{self.window.null}": the empty prompt never trains here; leave it out')
        return self
