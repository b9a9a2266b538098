"""A run, a bundle or a name in the registry -> a tuned encoder that a mixture may have, of the search's own base."""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from craftor import checkpoint, registry, tracking
from craftor.description import describe
from craftor.diffuser import Diffuser
from craftor.diffuser import load as load_diffuser
from craftor.prefix_cache import weights_digest
from craftor.quickstart import load_run
from craftor.recipe import Recipe, RecipeError, RewardTuning


@dataclass(frozen=True)
class Ingredient:
    """A tuned encoder: its folder and the denoising steps it was trained for, in the search's rollout."""

    name: str
    source: str
    folder: str
    steps: tuple[int, int]


def ingredients(recipe: Recipe, encoders: Sequence[str], out: Path) -> list[Ingredient]:
    """Find each encoder. Raises RecipeError for what is none, and for one that was tuned from another base."""
    assert isinstance(recipe.task, RewardTuning)
    diffuser = load_diffuser(recipe.model)
    timesteps = [step.timestep for step in diffuser.guided(recipe.task.rollout).schedule]
    found: list[Ingredient] = []
    for source in encoders:
        folder, description = _open(source, diffuser, out)
        if description["base"]["text_encoder_sha256"] != weights_digest([diffuser.text_encoder]):
            raise RecipeError(f"{source}: tuned from another base, {description['base']['model']}")
        if (folder / "unet").is_dir():
            raise RecipeError(f"{source}: has a tuned UNet; only encoders are mixed")
        window = description["window"]
        steps = [i for i, t in enumerate(timesteps) if window["last_timestep"] <= t <= window["first_timestep"]]
        if not steps:
            raise RecipeError(f"{source}: its window {window} holds no step of a rollout of {len(timesteps)}")
        names = [ingredient.name for ingredient in found]
        name = description["name"] if description["name"] not in names else f"{description['name']}-{len(names)}"
        found.append(Ingredient(name, source, str(folder.resolve()), (steps[0], steps[-1] + 1)))
    return found


def _open(source: str, diffuser: Diffuser, out: Path) -> tuple[Path, dict[str, Any]]:
    """An encoder's folder and its description, as `encoder.toml` has it."""
    if source.startswith("models:/"):
        tracking.client(out.parent)
        bundle = registry.fetch(source, out / "encoders" / source.removeprefix("models:/").replace("/", "-"))
        return bundle, tomllib.loads((bundle / "encoder.toml").read_text())
    folder = Path(source)
    if (folder / "encoder.toml").is_file():
        registry.verify_bundle(folder)
        return folder, tomllib.loads((folder / "encoder.toml").read_text())
    if not (folder / "recipe.toml").is_file():
        raise RecipeError(f"{source}: neither a run folder, nor an encoder bundle, nor models:/NAME@ALIAS")
    trained, last = load_run(folder), checkpoint.latest(folder)
    if last is None:
        raise RecipeError(f"{source}: no complete checkpoint in it")
    return last, describe(trained, load_diffuser(trained.model)) | {"name": folder.name}
