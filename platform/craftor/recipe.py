"""Recipes: one TOML file -> one frozen, fully validated `Recipe`. Imports no torch."""

import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from craftor.evaluation_checks import check_evaluation, check_validation
from craftor.explain import RecipeError, explain
from craftor.guards import Guards
from craftor.object_settings import ObjectEncoder
from craftor.overrides import override
from craftor.rollout import Rollout, Section
from craftor.run_settings import Data, Evaluation, Model, Optimizer, Register, Run, Validation
from craftor.sampled_settings import PolicyGradient, RewardWeighted, Sampled
from craftor.searching.settings import MEASURED, Distribution, Search, Value, corners, expand, substitute
from craftor.task_settings import Denoising, DirectTuning, Reward, RewardTuning, Tuning
from craftor.workers import Workers, check_parts_in_shards, check_task_in_shards

__all__ = [
    "Data",
    "Denoising",
    "DirectTuning",
    "Evaluation",
    "Model",
    "ObjectEncoder",
    "Optimizer",
    "PolicyGradient",
    "RecipeError",
    "Register",
    "Reward",
    "RewardTuning",
    "RewardWeighted",
    "Rollout",
    "Run",
    "Sampled",
    "Search",
    "Tuning",
    "Validation",
    "Workers",
]  # and the classes below


class Recipe(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(0, ge=0)
    model: Model
    data: Data
    task: Annotated[
        RewardTuning | PolicyGradient | RewardWeighted | DirectTuning | Denoising | ObjectEncoder,
        Field(discriminator="kind"),
    ]
    optimizer: Optimizer
    run: Run
    workers: Workers = Workers()
    guards: Guards = Guards()
    register_as: Register | None = Field(None, alias="register")
    evaluation: Evaluation | None = None
    validation: Validation | None = None
    search: Search | None = None

    @model_validator(mode="after")
    def _batch_divides(self) -> "Recipe":
        size, num = self.run.batch_size, self.workers.num
        if isinstance(num, int) and num and size % num:
            allowed = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
            raise ValueError(f"run.batch_size = {size} is not a multiple of workers.num = {num}; allowed: {allowed}")
        if not isinstance(num, int) and not num[0] <= num[1] <= size:
            raise ValueError(
                f"workers.num = {list(num)}: expected [least, most] with least <= most <= run.batch_size = {size}"
            )
        return self

    @model_validator(mode="after")
    def _shards_can_train(self) -> "Recipe":
        if self.workers.strategy == "ddp":
            return self
        for key, value, unfit, allowed in (
            ("workers.num", self.workers.num, self.workers.least == 0, "1 or more"),
            ("model.channels_last", "true", self.model.channels_last, "false"),
            ("model.compile", "true", self.model.compile, "false"),
            ("search", "{...}", self.search is not None, "no search"),
        ):
            if unfit:
                raise ValueError(f'workers.strategy = "fsdp" and {key} = {value}; allowed: {allowed}, or "ddp"')
        check_task_in_shards(self.task)
        check_parts_in_shards(self.workers, self.run.batch_size, self.run.micro_batch)
        return self

    @model_validator(mode="after")
    def _tuned_encoder_has_a_window(self) -> "Recipe":
        if self.model.text_encoder is None:
            return self
        if not isinstance(self.task, RewardTuning):
            raise ValueError(
                f"model.text_encoder = {self.model.text_encoder!r}: it conditions a window, and task.kind = "
                f'"{self.task.kind}" has none; allowed: reward_tuning, policy_gradient, reward_weighted'
            )
        train = self.task.train
        if adapted := [name for name in train.encoders if train.parts[name].method == "lora"]:
            raise ValueError(
                f"model.text_encoder = {self.model.text_encoder!r}: an adapter of {adapted[0]} would be read as one of "
                f"the base's, what it adapts is not saved with it; allowed: method = 'full'"
            )
        return self

    @model_validator(mode="after")
    def _precision_can_train(self) -> "Recipe":
        task = self.task
        if isinstance(task, ObjectEncoder):
            trains_unet = True
        else:
            trains_unet = isinstance(task, Denoising) or task.train.unet is not None
        if self.model.precision == "fp16" and trains_unet:
            raise ValueError('model.precision = "fp16": the gradient of UNet weights underflows; allowed: bf16, fp32')
        if self.model.precision == "fp16" and task.kind != "reward_tuning":
            raise ValueError(
                f'model.precision = "fp16" and task.kind = "{task.kind}": its gradient would underflow, for only '
                "reward_tuning scales it; allowed: bf16, fp32"
            )
        return self

    @model_validator(mode="after")
    def _objects_mix(self) -> "Recipe":
        if isinstance(self.task, ObjectEncoder):
            self.task.check_batch(self.run.batch_size)
        return self

    @property
    def images_per_step(self) -> int:
        """Images that are made and scored, or learnt, in one optimiser step."""
        return self.run.batch_size * (self.task.samples_per_prompt if isinstance(self.task, PolicyGradient) else 1)

    @property
    def num_processes(self) -> int:
        """Training workers, actors of prefixes and rewards, a validation: what a local cluster needs CPUs for."""
        staged = isinstance(self.task, RewardTuning) and self.task.prefix.mode == "stage"
        prefixes = self.task.prefix.actors if isinstance(self.task, RewardTuning) and staged else 0
        rewards = self.task.rewards.values() if isinstance(self.task, Tuning) else ()
        placed = [r.replicas * r.num_cpus for r in rewards if r.placement == "actors" and r.in_training]
        beside = self.validation.num_cpus if self.validation else 0
        return self.workers.processes + self.workers.most * prefixes + math.ceil(sum(placed) + beside)

    @model_validator(mode="after")
    def _rollouts_end_at_checkpoints(self) -> "Recipe":
        """The policy that samples is not saved: a run goes on where it and the one that learns are the same."""
        every = self.task.updates_per_rollout if isinstance(self.task, PolicyGradient) else 1
        if self.run.checkpoint_every % every:
            raise ValueError(
                f"run.checkpoint_every = {self.run.checkpoint_every} is not a multiple of task.updates_per_rollout = "
                f"{every}; allowed: {every}, {2 * every}, ..."
            )
        return self

    @model_validator(mode="after")
    def _tuned_images_can_be_judged(self) -> "Recipe":
        if self.evaluation is not None:
            check_evaluation(self.evaluation, self.task)
        if self.validation is not None:
            check_validation(self.task, self.workers, searches=self.search is not None)
        return self

    @model_validator(mode="after")
    def _guards_watch_what_there_is(self) -> "Recipe":
        """A rule on a metric that no line will ever have would watch in vain."""
        if isinstance(self.task, Tuning):
            known = self.task.metrics()
            for rule in self.guards.rules:
                if rule.metric not in known:
                    unscored = (
                        "; it is scored in evaluation only: give it `every`" if rule.metric in self.task.rewards else ""
                    )
                    raise ValueError(f"guards: no metric {rule.metric!r}{unscored}; there are {', '.join(known)}")
        return self

    @model_validator(mode="after")
    def _search_can_start(self) -> "Recipe":
        """Every key of the search's space at its ends makes a valid recipe, and every metric is one."""
        if self.search is None:
            return self
        if self.task.kind != "reward_tuning":
            raise ValueError(f'search: task.kind = "{self.task.kind}"; allowed: reward_tuning')
        if not self.workers.num:
            raise ValueError("search: workers.num = 0, but trials run beside each other; allowed: 1 or more")
        if self.run.storage is not None:
            raise ValueError("search: run.storage would be one home for all trials; leave it out, and share --out")
        known = (*self.task.rewards, *MEASURED)
        if unknown := [metric for metric in self.search.metrics if metric not in known]:
            why = "; total weighs the rewards differently in every trial" if unknown[0] == "total" else ""
            raise ValueError(f"search: no metric {unknown[0]!r}{why}; there are {', '.join(known)}")
        for values in corners(self.search_space):
            try:
                self.with_values(values)
            except ValidationError as error:
                shown = ", ".join(f"{key} = {value!r}" for key, value in values.items())
                raise ValueError(f"search.space: {shown}: {explain(error.errors()[0], Recipe)}") from None
        return self

    @property
    def search_space(self) -> dict[str, Distribution]:
        """`[search.space]` by full dotted keys."""
        assert self.search is not None
        sections = [info.alias or name for name, info in Recipe.model_fields.items()]
        return expand(self.search.space, self.data_of(), sections)

    def with_values(self, values: Mapping[str, Value]) -> "Recipe":
        """A trial's recipe. Raises pydantic's ValidationError for values that the schema refuses."""
        return Recipe.model_validate(substitute(self.data_of(), values))

    def data_of(self) -> dict[str, Any]:
        """What a recipe file of it would hold."""
        return self.model_dump(by_alias=True, exclude_none=True, mode="json")


def load(path: Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read a recipe and apply dotted overrides. Raises `RecipeError` naming file, key, value and what is allowed."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not valid TOML: {error}") from None
    for key, value in (overrides or {}).items():
        override(data, key, value, path)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError("\n".join(f"{path}: {explain(e, Recipe)}" for e in error.errors())) from None


def load_run(run_dir: Path) -> Recipe:
    """The resolved recipe of a run folder. Raises `RecipeError` where there is none."""
    if not (run_dir / "recipe.toml").is_file():
        raise RecipeError(f"{run_dir}: no run there (no recipe.toml in it)")
    return load(run_dir / "recipe.toml")
