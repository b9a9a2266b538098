"""Recipes: one TOML file -> one frozen, fully validated `Recipe`. Imports no torch."""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from craftor.explain import explain


class RecipeError(ValueError):
    """A recipe that cannot run; the message names the file, the key, the value and what is allowed."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Model(Section):
    path: str
    """A `StableDiffusionPipeline` folder or hub id; `micro:NAME` is a folder shipped with `craftor_micro`."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the UNet; what trains keeps fp32 master weights. Evaluation is always fp32."""


class Data(Section):
    path: str
    """Parquet, CSV, JSONL or text; a local path, an fsspec URL, or `micro:FILE`. Image-caption pairs are Parquet."""
    column: str = "prompt"
    max_rows: int | None = Field(None, ge=1)
    min_chars: int = Field(1, ge=1)
    max_chars: int = Field(1000, ge=1)
    deduplicate: bool = True


class Reward(Section):
    kind: str
    """A key of `craftor_rewards.REWARDS`."""
    weights: str
    """Folder or hub id of the reward's weights; `micro:NAME` is shipped."""
    weight: float = Field(0.0, ge=0)
    """Factor of the (unscaled) score in the objective."""
    evaluation_only: bool = False

    @model_validator(mode="after")
    def _weight_or_evaluation_only(self) -> "Reward":
        if self.evaluation_only == (self.weight > 0):
            raise ValueError(
                f"weight is {self.weight} and evaluation_only is {str(self.evaluation_only).lower()}; "
                "allowed: weight > 0 for a trained reward, or evaluation_only = true with no weight"
            )
        return self


class Rollout(Section):
    num_steps: int = Field(25, ge=1, le=1000)
    guidance_scale: float = Field(7.5, ge=1)


class Window(Section):
    """Denoising steps whose embeddings come from the trained encoder, with gradient: `last`, or `first` to `stop`."""

    last: int | None = Field(None, ge=1)
    start: int | None = Field(None, ge=0)
    stop: int | None = Field(None, ge=1)
    recompute: bool = False
    """Recompute each window step during backward: memory of one step, at the cost of one more forward pass."""

    @model_validator(mode="after")
    def _one_form(self) -> "Window":
        if (self.last is None) == (self.start is None) or (self.start is None) != (self.stop is None):
            raise ValueError("give either last = K, or start = A and stop = B (denoising step numbers)")
        if self.start is not None and self.stop is not None and self.start >= self.stop:
            raise ValueError(f"start = {self.start} is not before stop = {self.stop}")
        return self

    def steps(self, num_steps: int) -> range:
        """The window as a range of denoising step numbers of a `num_steps` schedule."""
        if self.last is not None:
            return range(num_steps - self.last, num_steps)
        assert self.start is not None and self.stop is not None
        return range(self.start, self.stop)


class RewardTuning(Section):
    """Fine-tune the text encoder by reward, from prompts alone (TextCraftor, section 3.2.2)."""

    kind: Literal["reward_tuning"]
    rollout: Rollout = Rollout()
    window: Window
    rewards: dict[str, Reward]

    @field_validator("rewards")
    @classmethod
    def _clip_term_is_on(cls, rewards: dict[str, Reward]) -> dict[str, Reward]:
        trained = {name: reward for name, reward in rewards.items() if not reward.evaluation_only}
        if not trained:
            raise ValueError("no reward has a weight; at least one, and a clip_score among them, is needed")
        if not any(reward.kind == "clip_score" for reward in trained.values()):
            raise ValueError(
                f"no clip_score among the trained rewards ({', '.join(trained)}): without the CLIP term training "
                "collapses onto one preferred image; add one with weight > 0"
            )
        return rewards

    @model_validator(mode="after")
    def _window_fits(self) -> "RewardTuning":
        steps, num_steps = self.window.steps(self.rollout.num_steps), self.rollout.num_steps
        if steps.start < 0 or steps.stop > num_steps:
            raise ValueError(
                f"window: denoising steps {steps.start}..{steps.stop - 1} do not fit in rollout.num_steps = {num_steps}"
                f"; allowed: last <= {num_steps}, stop <= {num_steps}"
            )
        return self


class Denoising(Section):
    """Train the UNet of a pipeline on image-caption pairs by the denoising loss."""

    kind: Literal["denoising"]
    caption_dropout: float = Field(0.1, ge=0, lt=1)
    min_snr_gamma: float = Field(5.0, gt=0)
    """Loss weight min(SNR, gamma), as Hang et al. 2023."""
    min_weight: float = Field(0.0, ge=0, le=1)
    """Floor of the weight on the error of v or of the noise. Without one, nearly pure noise counts for nothing, and
    that is where a sampler that starts from pure noise decides the layout."""


class Optimizer(Section):
    lr: float = Field(gt=0)
    betas: Annotated[tuple[float, float], Field(strict=False)] = (0.9, 0.999)
    weight_decay: float = Field(0.01, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    warmup_steps: int = Field(0, ge=0)
    cosine_from: float = Field(1.0, ge=0, le=1)
    """Share of the run after which the learning rate falls to zero along a cosine; 1 keeps it constant."""
    ema_decay: float | None = Field(None, gt=0, lt=1)


class Run(Section):
    num_steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    """Samples per optimiser step over all workers."""
    checkpoint_every: int = Field(50, ge=1)


class Workers(Section):
    num: int = Field(1, ge=1)
    threads: int = Field(1, ge=1)
    """CPU threads per worker; part of the recipe because bit-for-bit results depend on it."""


class Register(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    aliases: Annotated[tuple[str, ...], Field(strict=False)] = ()

    @field_validator("aliases")
    @classmethod
    def _not_reserved(cls, aliases: tuple[str, ...]) -> tuple[str, ...]:
        if any(alias.lower() == "latest" for alias in aliases):
            raise ValueError("'latest' is reserved by MLflow; choose another alias, for example 'candidate'")
        return aliases


class Evaluation(Section):
    prompts: str
    """Held-out prompts: JSONL with a `prompt` and, in the micro world, a `description` the referee judges by."""
    num_prompts: int = Field(200, ge=2)
    num_seeds: int = Field(2, ge=1)
    use_from: int | None = Field(None, ge=0)
    """First denoising step that sees the tuned encoder; by default the window's first."""
    weight: float = Field(1.0, ge=0, le=1)
    """Weight of the tuned embedding; the base has the rest."""


class Recipe(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(0, ge=0)
    model: Model
    data: Data
    task: Annotated[RewardTuning | Denoising, Field(discriminator="kind")]
    optimizer: Optimizer
    run: Run
    workers: Workers = Workers()
    register_as: Register | None = Field(None, alias="register")
    evaluation: Evaluation | None = None

    @model_validator(mode="after")
    def _batch_divides(self) -> "Recipe":
        if self.run.batch_size % self.workers.num:
            raise ValueError(
                f"run.batch_size = {self.run.batch_size} is not a multiple of workers.num = {self.workers.num}"
            )
        return self


def load(path: Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read a recipe and apply dotted overrides. Raises `RecipeError` naming file, key, value and what is allowed."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not valid TOML: {error}") from None
    for key, value in (overrides or {}).items():
        _set(data, key, value, path)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError("\n".join(f"{path}: {explain(e, Recipe)}" for e in error.errors())) from None


def parse_override(text: str) -> tuple[str, Any]:
    """`a.b=value` -> ("a.b", value); the value is read as TOML, else taken as a string."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {text}: expected key.path=value")
    try:
        return key, tomllib.loads(f"v = {value}")["v"]
    except tomllib.TOMLDecodeError:
        return key, value


def _set(data: dict[str, Any], dotted: str, value: Any, path: Path) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise RecipeError(f"{path}: --set {dotted}: {parent} is a value, not a section")
    data[last] = value
