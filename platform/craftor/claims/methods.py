"""The methods that claims compare: a recipe and what is changed in it; and the images that are made with them.

All train for the same time on one core, from the same prompts, with the same seeds: a method whose step costs half as
much takes twice as many.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from craftor.explain import explain
from craftor.locate import shipped_recipe
from craftor.recipe import Recipe, RecipeError, load
from craftor.searching.settings import substitute

REFERENCE = "micro_textcraftor.toml"
SCORED_BY = "textcraftor"
"""The method by whose rewards all images are scored."""
PAIRS = "pairs"
"""Stands for image-caption pairs, in `data.path`."""


SECONDS = 2.5
"""What a step of 16 samples of the reference takes of one core, all that a worker does: as measured on an AMD EPYC. One
with half the speed in bf16 took 1.8 times as long, in the same proportions."""


@dataclass(frozen=True)
class Method:
    """A run: a recipe by its file's name, and dotted keys that differ; None takes a key away."""

    recipe: str = REFERENCE
    changes: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = SECONDS
    """What a step of 16 samples takes of one core."""


_PREFERENCE = {
    "task.rewards.aesthetic": None,
    "task.rewards.preference.evaluation_only": None,
    "task.rewards.preference.weight": 1.0,
}
_ENCODER, _UNET = {"method": "full"}, {"method": "full", "lr": 5e-5}

NUM_POINTS = 3
"""Checkpoints of a run, whose images show how it grew."""
FEW_PROMPTS = 48
METHODS: dict[str, Method] = {
    "textcraftor": Method(),
    "direct": Method(
        changes={
            "task.kind": "direct_tuning",
            "task.window": None,
            "task.prefix": None,
            "data.path": PAIRS,
        },
        seconds=0.5,
    ),
    "ddpo": Method("micro_ddpo_preference.toml", seconds=2.3),
    "unet": Method(changes={"task.train": {"unet": _UNET}}, seconds=3.0),
    "both": Method(changes={"task.train": {"text_encoder": _ENCODER, "unet": _UNET}}, seconds=3.0),
    # The schema insists on a CLIP term, for the reason that C8 tests; this weight is too small to matter.
    "no_clip": Method(changes={"task.rewards.clip.weight": 1e-6}),
    "clip_only": Method(
        changes={"task.rewards.aesthetic.evaluation_only": True, "task.rewards.aesthetic.weight": None}
    ),
    "preference": Method(changes=_PREFERENCE),
    "all_pairs": Method(changes={**_PREFERENCE, "task.rewards.preference.kind": "craftor.claims.all_pairs:AllPairs"}),
    "original_null": Method(changes={"task.window.null": "original"}),
    "last_10": Method(changes={"task.window": {"last": 10}}, seconds=3.0),
    "middle": Method(changes={"task.window": {"start": 5, "stop": 10}}, seconds=3.5),
    # For the grid of C9 alone. A window's cost grows with the steps after it, through which the gradient passes.
    "first": Method(changes={"task.window": {"first": 5}}, seconds=4.0),
    "later": Method(changes={"task.window": {"start": 10, "stop": 15}}, seconds=3.0),
    "first_10": Method(changes={"task.window": {"first": 10}}, seconds=4.0),
    "middle_10": Method(changes={"task.window": {"start": 5, "stop": 15}}, seconds=3.5),
}


@dataclass(frozen=True)
class Images:
    """What is evaluated: one method's encoder, or several mixed, each in its own steps unless `use_from` says more."""

    methods: tuple[str, ...]
    weights: tuple[float, ...] = (1.0,)
    use_from: float | None = None
    """First denoising step that sees the encoder, as a share of the rollout."""
    num_strips: int = 0
    methods_beside: Mapping[str, Any] = field(default_factory=dict)
    """Of `[evaluation.methods]`: what is made without tuned encoders, named as the images are."""


IMAGES: dict[str, Images] = {
    **{name: Images((name,)) for name in METHODS},
    "textcraftor": Images(("textcraftor",), num_strips=48),
    "engineered": Images((), (), methods_beside={"engineered": {"kind": "prompt_engineering"}}),
    "used_10": Images(("textcraftor",), use_from=0.5),
    "used_15": Images(("textcraftor",), use_from=0.25),
    "two_windows": Images(("middle", "textcraftor"), (1.0, 1.0)),
    "half_and_half": Images(("no_clip", "clip_only"), (0.5, 0.5)),
}


@dataclass(frozen=True)
class Budget:
    """What every method gets, and by how much it is judged."""

    num_steps: int = 20
    """Of the reference; the others take as many as cost the same."""
    batch_size: int = 24
    num_seeds: int = 3
    """Of training."""
    num_prompts: int = 96
    num_images: int = 2
    """For each held-out prompt."""
    workers: int = 2
    model: str | None = None
    reference: str = REFERENCE
    """Stands in for `micro_textcraftor.toml`: another model's recipe; its rewards have the same names."""
    pairs: str | None = None
    """Image-caption pairs for direct fine-tuning; by default renders of the micro world."""

    @property
    def few(self) -> dict[str, int]:
        """What is scored of what only a picture shows, or a grid: the first prompts, an image of each."""
        return {"evaluation.num_prompts": min(FEW_PROMPTS, self.num_prompts), "evaluation.num_seeds": 1}

    def steps_of(self, method: str) -> int:
        """Optimiser steps at equal compute."""
        return max(1, round(self.num_steps * SECONDS / METHODS[method].seconds))


def recipe_of(name: str, seed: int, budget: Budget, pairs: Path) -> Recipe:
    """A method's recipe under a budget. Raises RecipeError naming the method where it cannot be."""
    method = METHODS[name]
    source = Path(budget.reference if method.recipe == REFERENCE else method.recipe)
    data = load(source if source.is_file() else _shipped(source.name, name)).data_of()
    # Policy gradients sample each prompt several times; what is equal for all is the number of images a step.
    prompts = max(1, budget.batch_size // data["task"].get("samples_per_prompt", 1))
    num_steps = budget.steps_of(name)
    changes = {
        **method.changes,
        "name": f"claims-{name}",
        "seed": seed,
        "run.num_steps": num_steps,
        "run.batch_size": prompts,
        "run.checkpoint_every": math.ceil(num_steps / NUM_POINTS),
        "workers.num": budget.workers,
        "register": None,
        "evaluation.num_prompts": budget.num_prompts,
        "evaluation.num_seeds": budget.num_images,
        "evaluation.precision": "auto",
    }
    if budget.model is not None:
        changes["model.path"] = budget.model
    if changes.get("data.path") == PAIRS:
        changes["data.path"] = str(pairs)
    return changed(data, changes, f"claims: method {name}")


def changed(data: Mapping[str, Any], changes: Mapping[str, Any], subject: str) -> Recipe:
    """A recipe's data with other values at dotted keys, and without those whose value is None."""
    kept = substitute(data, {key: value for key, value in changes.items() if value is not None})
    for key in (key for key, value in changes.items() if value is None):
        *parents, last = key.split(".")
        inside = kept
        for parent in parents:
            inside = inside.get(parent, {})
        inside.pop(last, None)
    try:
        return Recipe.model_validate(kept)
    except ValidationError as error:
        raise RecipeError(f"{subject}: {explain(error.errors()[0], Recipe)}") from None


def _shipped(file: str, name: str) -> Path:
    try:
        return shipped_recipe(file)
    except StopIteration:
        raise RecipeError(f"claims: method {name}: no recipe {file}") from None
