"""The rewards of a recipe and how they are put together. Imports no torch."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from craftor.rollout import Section

WEIGHTED = {
    "clip": ("clip_score", "clip-vit-g-14"),
    "aesthetic": ("aesthetic", "laion-aesthetic-v2"),
    "pick": ("pick_score", "pick-score-v1"),
    "hps": ("hps", "hps-v2"),
}
"""TextCraftor's four rewards: kind and public weights."""
WEIGHTINGS = {
    "paper_text": (100.0, 1.0, 1.0, 100.0),
    "script": (50.0, 3.0, 1.0, 100.0),
    "table6": (100.0, 3.0, 1.0, 100.0),
}
"""The weights that TextCraftor's text states, that its published command sets, and from which its ablation (table 6)
departs, in the order of `WEIGHTED`. They weigh the scores as `craftor_rewards` returns them."""

ACTOR_KEYS = ("replicas", "num_cpus", "num_gpus", "runtime_env", "timeout_seconds")
RUNTIME_ENV = (
    *("conda", "config", "container", "env_vars", "excludes", "image_uri", "pip"),
    *("py_executable", "py_modules", "uv", "working_dir"),
)
"""The keys of Ray's `runtime_env` that are data."""


ORACLES = {"referee_accuracy": "craftor_micro.oracle:RefereeAccuracy"}
"""Kinds that judge by the truth of the micro world, which no user has: for runs that show what a perfect reward would
give. They go by the class's own name everywhere else."""


class Reward(Section):
    kind: str
    """A key of `craftor_rewards.REWARDS` or of `ORACLES`, or `module:attr`."""
    weights: str
    """Folder or hub id of the reward's weights; `micro:NAME` is shipped."""
    options: dict[str, Any] = {}
    """What the kind's class takes beside its weights, such as `timeout`, `num_retries` and `token_env` of `http`."""
    weight: float = Field(0.0, ge=0)
    """Factor of the scaled score in the objective."""
    scale: float = Field(1.0, gt=0)
    """Factor that brings the score to a size in which weights of unlike rewards can be compared: 100 for a cosine."""
    evaluation_only: bool = False
    every: int | None = Field(None, ge=1)
    """Score the training images by this evaluation-only reward every so many steps: a metric for `[guards]`."""
    placement: Literal["inline", "actors"] = "inline"
    """In each training worker, or in Ray actors that all of them share; the keys below are the actors'."""
    replicas: int = Field(1, ge=1)
    """Actors; each batch is divided among them."""
    num_cpus: float = Field(1.0, ge=0)
    """Of each actor: what Ray reserves, and its number of threads."""
    num_gpus: float = Field(0.0, ge=0)
    """Of each actor, which computes on the GPU unless this is 0."""
    runtime_env: dict[str, Any] = {}
    """Ray's `runtime_env`: packages, variables or an image of the actors' own."""
    timeout_seconds: float = Field(600.0, gt=0)
    """The longest to wait for the actors to start, and for an answer."""

    @property
    def factor(self) -> float:
        """What the score itself is multiplied by in the objective."""
        return self.weight * self.scale

    @property
    def computed_by(self) -> tuple[str, str, dict[str, Any]]:
        """All that decides a score."""
        return self.kind, self.weights, self.options

    @property
    def in_training(self) -> bool:
        """Whether it scores training images, to train or to watch."""
        return not self.evaluation_only or self.every is not None

    @field_validator("kind")
    @classmethod
    def _resolve_oracle(cls, kind: str) -> str:
        return ORACLES.get(kind, kind)

    @property
    def is_oracle(self) -> bool:
        return self.kind in ORACLES.values()

    @field_validator("runtime_env")
    @classmethod
    def _known_to_ray(cls, runtime_env: dict[str, Any]) -> dict[str, Any]:
        if unknown := sorted(runtime_env.keys() - set(RUNTIME_ENV)):
            raise ValueError(f"unknown key {', '.join(unknown)}; allowed: {', '.join(RUNTIME_ENV)}")
        return runtime_env

    @model_validator(mode="after")
    def _actors_have_their_keys(self) -> "Reward":
        given = [key for key in ACTOR_KEYS if getattr(self, key) != type(self).model_fields[key].default]
        if self.placement == "inline" and given:
            raise ValueError(
                f'placement is "inline" but {given[0]} is {getattr(self, given[0])!r}; '
                f'{", ".join(ACTOR_KEYS)} go with placement = "actors"'
            )
        return self

    @model_validator(mode="after")
    def _every_is_for_evaluation_only(self) -> "Reward":
        if self.every is not None and not self.evaluation_only:
            raise ValueError(f"every = {self.every} goes with evaluation_only = true: trained rewards score every step")
        return self

    @model_validator(mode="after")
    def _weight_or_evaluation_only(self) -> "Reward":
        if self.evaluation_only == (self.weight > 0):
            raise ValueError(
                f"weight is {self.weight} and evaluation_only is {str(self.evaluation_only).lower()}; "
                "allowed: weight > 0 for a trained reward, or evaluation_only = true with no weight"
            )
        return self


class Composition(Section):
    """How several rewards become one gradient; the rewards' image gradients are known one by one."""

    weights: Literal["given", "equal_shares"] = "given"
    """`equal_shares` sets the weights so that each reward's gradient is as long as any other's, in the mean over the
    batch; the given weights then only say how long all are together."""
    conflicts: Literal["sum", "pcgrad"] = "sum"
    """`pcgrad` drops from each reward's gradient what opposes another's, image by image (Yu et al. 2020)."""
    normalise: bool = False
    """Weigh scores less their running mean, over their running standard deviation."""
    smoothing: float = Field(0.9, ge=0, lt=1)
    """Share of what was known in the running means, the rest is the last batch's: the higher, the slower they move."""
    report_every: int = Field(1, ge=1)
    """Steps between reports of the cosines between the rewards' gradients and of their shares."""

    @property
    def moves(self) -> bool:
        """Whether what a reward counts for changes from step to step."""
        return self.normalise or self.weights == "equal_shares"

    @model_validator(mode="after")
    def _one_rule_for_weights(self) -> "Composition":
        if self.normalise and self.weights == "equal_shares":
            raise ValueError('normalise = true goes with weights = "given": equal shares follow from gradients alone')
        return self


def expand_preset(rewards: Any) -> Any:
    """`[task.rewards]` with the rewards that its `preset` stands for, if it has one; its other keys change or add some.

    Raises ValueError for an unknown preset.
    """
    if not isinstance(rewards, dict) or not isinstance(rewards.get("preset"), str):
        return rewards
    if (weights := WEIGHTINGS.get(rewards["preset"])) is None:
        raise ValueError(f"preset is {rewards['preset']!r}; allowed: {', '.join(WEIGHTINGS)}")
    preset = {
        name: {"kind": kind, "weights": public, "weight": weight}
        for (name, (kind, public)), weight in zip(WEIGHTED.items(), weights, strict=True)
    }
    given = {name: reward for name, reward in rewards.items() if name != "preset"}
    changed = {
        name: {**preset.get(name, {}), **reward} if isinstance(reward, dict) else reward
        for name, reward in given.items()
    }
    return {**preset, **changed}
