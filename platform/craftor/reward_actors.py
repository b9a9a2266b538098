"""Rewards as Ray actors: images go to them through the object store; scores and dL/d(images) come back.

A trainer then needs neither their weights nor their memory, and each has resources and a Python environment of its own.
The driver starts them for the time of a run (`running`); every training worker reaches them by name (`connect`).
Score i depends on image i alone, so a batch is divided among a reward's replicas, and their number changes nothing.
"""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
import ray
import torch
from jaxtyping import Float
from ray.exceptions import GetTimeoutError, RayError, RayTaskError, UnserializableException
from ray.runtime_env import RuntimeEnv
from torch import Tensor, nn

from craftor.allocation import keep_freed_memory
from craftor.determinism import prefer_deterministic
from craftor.locate import locate
from craftor.reward_settings import Reward as RewardSettings
from craftor_rewards import build

if TYPE_CHECKING:  # an actor's own environment need not have what a trainer imports
    from craftor.scoring import Scored


class RewardFailed(RuntimeError):
    """A reward that could not start, failed twice on the same images, or gave no answer in time.

    The message names the reward and ends with the actor's own traceback where there is one.
    """


class RewardActor:
    """One replica of a reward, with its weights."""

    def __init__(
        self, kind: str, weights: str, num_cpus: float, num_gpus: float, options: Mapping[str, Any] | None = None
    ) -> None:
        self.device = torch.device("cuda" if num_gpus else "cpu")
        torch.set_num_threads(max(1, int(num_cpus)))
        prefer_deterministic(self.device)
        self.reward = build(kind, locate(weights), **(options or {}))
        if isinstance(self.reward, nn.Module):
            self.reward.to(self.device)
        keep_freed_memory()

    def differentiable(self) -> bool:
        return self.reward.differentiable

    @ray.method(retry_exceptions=True)
    def score(
        self, images: np.ndarray, prompts: list[str], cotangent: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Scores, and the gradient of `(cotangent * scores).sum()`; None without a cotangent or where there is none."""
        leaf = to_tensor(images, self.device)
        wanted = cotangent is not None and self.reward.differentiable
        with torch.set_grad_enabled(wanted):
            scores = self.reward(leaf.requires_grad_(wanted), prompts)
        if scores.shape != (len(prompts),):
            raise ValueError(f"the reward returned shape {tuple(scores.shape)}; expected ({len(prompts)},)")
        if cotangent is None or not wanted:
            return to_array(scores), None
        (gradient,) = torch.autograd.grad(scores, leaf, to_tensor(cotangent, self.device).to(scores.dtype))
        return to_array(scores), to_array(gradient)


class Replicas:
    """One reward's actors as a `scoring.ScoreAndGradient`: they compute from the call on until its result is asked for.

    Parts of successive batches go to the replicas in turn, beginning with number `first`, so that workers that send one
    part each do not all send it to the same one.
    """

    def __init__(self, name: str, actors: Sequence[Any], timeout_seconds: float, first: int) -> None:
        self.name, self.actors, self.timeout = name, actors, timeout_seconds
        self.turns = itertools.count(first)
        self.differentiable: bool = self._get([actors[0].differentiable.remote()])[0]

    def __call__(
        self, images: Float[Tensor, "b 3 H W"], prompts: Sequence[str], cotangent: Float[Tensor, " b"] | None
    ) -> "Callable[[], Scored]":
        """Send the images, in the type they have, and return at once. The result raises RewardFailed."""
        calls = [
            self.actors[next(self.turns) % len(self.actors)].score.remote(
                to_array(images[part]),
                list(prompts[part]),
                None if cotangent is None else to_array(cotangent[part]),
            )
            for part in divide(len(images), len(self.actors))
        ]

        def wait() -> "Scored":
            scores, gradients = zip(*self._get(calls), strict=True)
            return (
                torch.cat([to_tensor(part, images.device) for part in scores]),
                None if gradients[0] is None else torch.cat([to_tensor(part, images.device) for part in gradients]),
            )

        return wait

    def _get(self, calls: list[Any]) -> list[Any]:
        try:
            return ray.get(calls, timeout=self.timeout)
        except GetTimeoutError:
            raise RewardFailed(
                f"reward '{self.name}' gave no answer in {self.timeout:g} s: it hangs, is being restarted, or is "
                f"slower than task.rewards.{self.name}.timeout_seconds allows; more replicas divide a batch further"
            ) from None
        except (RayTaskError, UnserializableException) as error:  # the latter: of a type that only the actor has
            raise RewardFailed(f"reward '{self.name}' failed twice on the same images:\n{_text(error)}") from None
        except RayError as error:
            raise RewardFailed(
                f"reward '{self.name}' lost its actor twice on the same images:\n{_text(error)}"
            ) from None


@contextmanager
def running(rewards: Mapping[str, RewardSettings]) -> Iterator[str]:
    """Start the actors of every reward placed on them; the value, for `connect`, is part of their names in Ray.

    Raises RewardFailed where a reward does not start, which includes loading its weights. All end with the block, or
    with the process that entered it.
    """
    scope, actors = uuid4().hex[:8], {}
    try:
        for name, settings in placed_on_actors(rewards).items():
            actors[name] = [_start(name, settings, actor_name(scope, name, i)) for i in range(settings.replicas)]
        for name, replicas in actors.items():
            _await_start(name, rewards[name], replicas)
        yield scope
    finally:
        for actor in itertools.chain(*actors.values()):
            ray.kill(actor)


def connect(rewards: Mapping[str, RewardSettings], scope: str, rank: int = 0) -> dict[str, Replicas]:
    """The rewards that `running` has started under this scope, for the training worker of this rank."""
    return {
        name: Replicas(
            name,
            [ray.get_actor(actor_name(scope, name, i)) for i in range(settings.replicas)],
            settings.timeout_seconds,
            rank,
        )
        for name, settings in placed_on_actors(rewards).items()
    }


def placed_on_actors(rewards: Mapping[str, RewardSettings]) -> dict[str, RewardSettings]:
    return {name: reward for name, reward in rewards.items() if reward.placement == "actors"}


def actor_name(scope: str, reward: str, replica: int) -> str:
    """What `ray list actors` shows."""
    return f"reward/{scope}/{reward}/{replica}"


def divide(num_images: int, num_replicas: int) -> list[slice]:
    """Contiguous parts of a batch whose sizes differ by one at most; never an empty one."""
    parts = min(num_images, num_replicas)
    bounds = [num_images * i // parts for i in range(parts + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]


def to_array(tensor: Tensor) -> np.ndarray:
    """A tensor as the object store holds it without pickling; int16 are the bits of bfloat16, which numpy lacks."""
    tensor = tensor.detach().cpu().contiguous()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def to_tensor(array: np.ndarray, device: torch.device) -> Tensor:
    """The inverse of `to_array`: a copy, for memory of the object store is read-only."""
    tensor = torch.tensor(array, device=device)
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor


def _start(name: str, settings: RewardSettings, ray_name: str) -> Any:
    try:
        runtime_env = RuntimeEnv(**settings.runtime_env)
    except (TypeError, ValueError) as error:
        raise RewardFailed(
            f"reward '{name}' did not start: its runtime_env is {settings.runtime_env}: {error}"
        ) from None
    actor = ray.remote(RewardActor).options(
        name=ray_name,
        num_cpus=settings.num_cpus,
        num_gpus=settings.num_gpus,
        runtime_env=runtime_env,
        # Killed, or lost with its node, it is started again; a call that ends so, or by raising, is made once more.
        max_restarts=-1,
        max_task_retries=1,
        # On many nodes, and out of the resources that a search's trial has reserved.
        scheduling_strategy="SPREAD",
    )
    return actor.remote(settings.kind, settings.weights, settings.num_cpus, settings.num_gpus, settings.options)


def _await_start(name: str, settings: RewardSettings, replicas: list[Any]) -> None:
    try:
        ray.get([actor.differentiable.remote() for actor in replicas], timeout=settings.timeout_seconds)
    except GetTimeoutError:
        free = {key: amount for key, amount in ray.available_resources().items() if key in ("CPU", "GPU")}
        raise RewardFailed(
            f"reward '{name}' did not start in {settings.timeout_seconds:g} s (task.rewards.{name}.timeout_seconds): "
            f"{settings.replicas} actors want num_cpus = {settings.num_cpus:g} and num_gpus = {settings.num_gpus:g} "
            f"each, and the cluster has {free} left; or they take longer to load, or die while they do"
        ) from None
    except RayError as error:
        raise RewardFailed(f"reward '{name}' did not start:\n{_text(error)}") from None


def _text(error: RayError) -> str:
    """The actor's traceback, without Ray's colours and its remark on errors of a type that only the actor has."""
    return re.sub(r"\x1b\[[0-9;]*m", "", str(error)).rpartition("Original exception:\n")[2]
