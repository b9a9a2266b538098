"""What a run trains on: prompts made into rows, pairs that are rows already, or a cache of rows with their prefix."""

import tempfile
from pathlib import Path

from craftor import prefix_cache, preflight, prompts
from craftor.cluster import ray_session
from craftor.diffuser import Diffuser
from craftor.diffuser import load as load_diffuser
from craftor.locate import absolute
from craftor.object_rows import check_mixture
from craftor.prompts import Prepared
from craftor.recipe import ObjectEncoder, Recipe, RecipeError, RewardTuning
from craftor.stream import IDS


def prepare(recipe: Recipe, run_dir: Path) -> Prepared:
    """Prompts are read into the run's folder; image-caption pairs are prepared Parquet already."""
    if isinstance(recipe.task, ObjectEncoder):
        check_mixture(recipe, run_dir / "recipe.toml")
    if not isinstance(recipe.task, RewardTuning):
        return prompts.describe(Path(recipe.data.path))
    diffuser = load_diffuser(recipe.model)
    try:
        return _with_prefix(recipe, diffuser, rows_of(recipe, diffuser, run_dir))
    except ValueError as error:
        raise RecipeError(f"{run_dir / 'recipe.toml'}: {error}") from None


def prepared_earlier(recipe: Recipe, run_dir: Path, digest: str) -> Prepared:
    """The rows a run began with. Raises RecipeError where they have changed since."""
    folder = run_dir / "rows" if isinstance(recipe.task, RewardTuning) else Path(recipe.data.path)
    prepared = prompts.describe(folder)
    if prepared.digest != digest:
        raise RecipeError(
            f"{folder}: its prompts have sha256 {prepared.digest[:16]}, but the run began with {digest[:16]}; "
            "put the original rows back, or start a new run"
        )
    try:
        return _with_prefix(recipe, load_diffuser(recipe.model), prepared)
    except ValueError as error:
        raise RecipeError(f"{run_dir / 'recipe.toml'}: {error}") from None


def fill_prefix_cache(recipe: Recipe, source: Path, url: str, num_actors: int) -> int:
    """Compute the prefixes of a recipe's samples into `url`; returns how many samples it holds then."""
    preflight.check(recipe, source)
    task = recipe.task
    if task.kind != "reward_tuning" or task.train.unet or task.window.outside == "tuned":
        raise RecipeError(
            f"{source}: what comes before its window changes while it trains: it cannot be computed apart"
        )
    recipe = absolute(recipe)
    with tempfile.TemporaryDirectory() as folder, ray_session(num_actors):
        diffuser = load_diffuser(recipe.model)
        try:
            prepared = rows_of(recipe, diffuser, Path(folder))
            made_from = prefix_cache.key(recipe, diffuser, prepared.digest)
            return prefix_cache.fill(recipe, prepared, made_from, url, num_actors)
        except (ValueError, ImportError, OSError) as error:  # no package for the URL's scheme; nobody may write there
            raise RecipeError(f"{source}: {error}") from None


def rows_of(recipe: Recipe, diffuser: Diffuser, folder: Path) -> Prepared:
    """Prompts as numbered, tokenized rows; tokenizers are saved first: a hub id has no folder an actor could read."""
    tokenizers = {}
    for name, tokenizer in diffuser.tokenizers.items():
        saved = (folder / name.replace("text_encoder", "tokenizer")).resolve()
        tokenizer.save_pretrained(saved)
        tokenizers[name.replace("text_encoder", IDS)] = str(saved)
    return prompts.prepare(recipe.data, tokenizers, folder / "rows")


def _with_prefix(recipe: Recipe, diffuser: Diffuser, prepared: Prepared) -> Prepared:
    """The same prompts, from the cache that also holds their prefixes where the recipe names one."""
    if not isinstance(recipe.task, RewardTuning) or recipe.task.prefix.cache is None:
        return prepared
    return prefix_cache.open_cache(recipe, prefix_cache.key(recipe, diffuser, prepared.digest))
