"""The `[task]` section of a recipe, by kind. Imports no torch."""

from itertools import combinations
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from craftor.guards import OTHERS, STATISTICS
from craftor.object_settings import IDENTITY, Identity, ShownObject
from craftor.reward_settings import Composition, Reward, expand_preset
from craftor.rollout import Rollout, Section, Window
from craftor.train_settings import Part, Train


class Prefix(Section):
    """Where the denoising steps before the window run; they carry no gradient and depend on nothing that trains."""

    mode: Literal["worker", "stage", "cache"] = "worker"
    """In the training worker, in a pool of Ray Data actors that stream latents to it, or read from a cache."""
    actors: int = Field(1, ge=1)
    """Actors per training worker, in `stage` mode."""
    gpus_per_actor: float = Field(0.0, ge=0)
    cache: str | None = None
    """A folder or fsspec URL that `craftor prefix` has filled."""

    @model_validator(mode="after")
    def _cache_and_mode(self) -> "Prefix":
        if (self.mode == "cache") != (self.cache is not None):
            raise ValueError(f'mode is "{self.mode}" and cache is {self.cache!r}: mode = "cache" and cache go together')
        return self


class Tuning(Section):
    """What the ways of tuning by reward share."""

    needs_clip: ClassVar[bool] = True
    """Whether what follows a reward's gradient must also follow a CLIP's."""

    train: Train = Train(text_encoder=Part())
    rollout: Rollout = Rollout()
    rewards: dict[str, Reward]
    """By name. `preset = "paper_text"`, "script" or "table6" stands for TextCraftor's four rewards with these weights
    (`reward_settings`); further keys add rewards to them or change theirs: `clip = { weight = 50.0 }`."""
    composition: Composition = Composition()
    anchor: float = Field(0.0, ge=0)
    """Weight of the mean squared distance of the prompts' embeddings from the original encoder's."""

    @property
    def factors(self) -> dict[str, float]:
        """Of the rewards that train, by name: what each score is multiplied by in the objective."""
        return {name: reward.factor for name, reward in self.rewards.items() if not reward.evaluation_only}

    def metrics(self) -> tuple[str, ...]:
        """Names of what a run logs, as the rules of `[guards]` know them."""
        trained = list(self.factors)
        watched = [name for name, reward in self.rewards.items() if reward.every]
        kinds = ["share"] if len(trained) > 1 else []
        kinds += ["factor"] if self.composition.moves else []
        kinds += ["norm"] if self.composition.weights == "equal_shares" else []
        each = [f"{kind}/{name}" for kind in kinds for name in trained]
        pairs = [f"cosine/{a}/{b}" for a, b in combinations(trained, 2)]
        return (*trained, *watched, *STATISTICS, *OTHERS, *each, *pairs)

    def acts(self) -> range:
        """The denoising steps of a rollout that see the trained encoder."""
        return range(self.rollout.num_steps)

    @property
    def oracle_trains(self) -> bool:
        """Whether the micro world's truth is what trains, and no longer what judges."""
        return any(reward.is_oracle and not reward.evaluation_only for reward in self.rewards.values())

    @field_validator("rewards", mode="before")
    @classmethod
    def _expand_preset(cls, rewards: Any) -> Any:
        return expand_preset(rewards)

    @model_validator(mode="after")
    def _anchor_holds_something(self) -> "Tuning":
        if self.anchor and not self.train.encoders:
            raise ValueError(
                f"anchor = {self.anchor}: it keeps a trained encoder near the original, and none trains; "
                "allowed: 0, or a text encoder in train"
            )
        return self

    @field_validator("rewards")
    @classmethod
    def _names_are_free(cls, rewards: dict[str, Reward]) -> dict[str, Reward]:
        if taken := [name for name in rewards if name in (*STATISTICS, *OTHERS)]:
            raise ValueError(f"a reward is named {taken[0]!r}, which is another metric's name; choose another")
        return rewards

    @field_validator("rewards")
    @classmethod
    def _clip_term_is_on(cls, rewards: dict[str, Reward]) -> dict[str, Reward]:
        trained = {name: reward for name, reward in rewards.items() if not reward.evaluation_only}
        if not trained:
            raise ValueError("no reward has a weight; at least one, and a clip_score among them, is needed")
        if cls.needs_clip and not any(reward.kind == "clip_score" for reward in trained.values()):
            raise ValueError(
                f"no clip_score among the trained rewards ({', '.join(trained)}): without the CLIP term training "
                "collapses onto one preferred image; add one with weight > 0"
            )
        return rewards


class RewardTuning(Tuning):
    """Fine-tune text encoder or UNet by reward, from prompts alone (TextCraftor, section 3.2.2)."""

    kind: Literal["reward_tuning"]
    window: Window
    prefix: Prefix = Prefix()
    shown: ShownObject | None = None

    @property
    def identity(self) -> Identity | None:
        return self.shown.identity if self.shown is not None else None

    @property
    def factors(self) -> dict[str, float]:
        own = {IDENTITY: self.identity.weight * self.identity.scale} if self.identity is not None else {}
        return super().factors | own

    def acts(self) -> range:
        """The window's steps, or all where the trained encoder also conditioned the others."""
        num_steps = self.rollout.num_steps
        return range(num_steps) if self.window.outside == "tuned" else self.window.span(num_steps)

    @model_validator(mode="after")
    def _window_fits(self) -> "RewardTuning":
        self.window.span(self.rollout.num_steps)
        return self

    @model_validator(mode="after")
    def _objects_can_be_shown(self) -> "RewardTuning":
        if self.shown is None:
            return self
        if self.identity is not None and IDENTITY in self.rewards:
            raise ValueError("shown.identity: a reward of task.rewards has the name 'identity' already; choose another")
        if self.train.unet is not None or self.train.text_encoder_2 is not None:
            raise ValueError("shown: the object encoder's UNet draws; allowed to train: text_encoder alone")
        if self.prefix.mode != "worker":
            raise ValueError(f'shown: prefix.mode = "{self.prefix.mode}" knows of no object; allowed: worker')
        return self

    @model_validator(mode="after")
    def _prefix_is_data(self) -> "RewardTuning":
        """A prefix computed apart must not depend on anything that trains."""
        if self.prefix.mode == "worker":
            return self
        if self.train.unet is not None:
            raise ValueError(
                f'prefix.mode = "{self.prefix.mode}": the prefix changes while the UNet trains; allowed: worker'
            )
        if self.window.outside == "tuned":
            raise ValueError(
                f'prefix.mode = "{self.prefix.mode}": with window.outside = "tuned" the prefix changes while the '
                'encoder trains; allowed: worker, or outside = "original"'
            )
        return self


class DirectTuning(Tuning):
    """Fine-tune the text encoder on image-caption pairs by reward of a one-step prediction (TextCraftor, 3.2.1)."""

    kind: Literal["direct_tuning"]
    timesteps: Annotated[tuple[int, int], Field(strict=False)] = (0, 999)
    """Noise levels drawn for the pairs, lowest and highest."""

    @field_validator("timesteps")
    @classmethod
    def _ordered(cls, timesteps: tuple[int, int]) -> tuple[int, int]:
        if not 0 <= timesteps[0] <= timesteps[1]:
            raise ValueError(f"{list(timesteps)}: expected [low, high] with 0 <= low <= high")
        return timesteps


class Denoising(Section):
    """Train the UNet of a pipeline on image-caption pairs by the denoising loss."""

    kind: Literal["denoising"]
    caption_dropout: float = Field(0.1, ge=0, lt=1)
    min_snr_gamma: float = Field(5.0, gt=0)
    """Loss weight min(SNR, gamma), as Hang et al. 2023."""
    min_weight: float = Field(0.0, ge=0, le=1)
    """Floor of the weight on the error of v or of the noise. Without one, nearly pure noise counts for nothing, and
    that is where a sampler that starts from pure noise decides the layout."""
