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
            raise ValueError("composition: equal_shares and pcgrad need the rewards' gradients; allowed: normalise")
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


class RankedTuning(Sampled):
    """Learn from a prompt's best and worst images, without any gradient through the chain.

    The untrained model makes the images. What trains learns to denoise the best from the noise levels of the window's
    steps (RAFT, Dong et al. 2023), or to denoise the best better than the worst, by more than the untrained model does
    (Diffusion-DPO, Wallace et al. 2024), or both. Guidance's empty prompt does not train.
    """

    own_metrics: ClassVar[tuple[str, ...]] = ("gap", "preferred")
    kind: Literal["ranked_tuning"]  # type: ignore[assignment]  # the tag of the union of tasks
    window: Window = Window(first=1, of=1, outside="tuned")
    """The steps whose noise levels are learnt, and in which what has trained is to be used; by default all."""
    samples_per_prompt: int = Field(4, ge=2)
    levels: int = Field(6, ge=1)
    """Noise levels at which each prompt's images are learnt in a step: the window has as many parts, each gives one."""
    best_weight: float = Field(1.0, ge=0)
    """Weight of the error in denoising the best image."""
    preference_weight: float = Field(0.0, ge=0)
    """Weight of preferring the best to the worst: -log sigmoid(-beta ((e - e0)(best) - (e - e0)(worst))), where e is
    the mean squared error and e0 the untrained model's."""
    beta: float = Field(1000.0, gt=0)

    def metrics(self) -> tuple[str, ...]:
        return tuple(name for name in super().metrics() if name != "preferred" or self.preference_weight)

    @model_validator(mode="after")
    def _something_is_learnt(self) -> "RankedTuning":
        if not self.best_weight and not self.preference_weight:
            raise ValueError("best_weight and preference_weight are 0: nothing is learnt; allowed: one of them > 0")
        if self.window.null != "tuned":
            raise ValueError(f'window.null = "{self.window.null}": the empty prompt never trains here; leave it out')
        return self
