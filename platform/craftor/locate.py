"""Where things are: `micro:NAME` is shipped with `craftor_micro`; a local path, a hub id or a URL stays what it is."""

from importlib.resources import files
from pathlib import Path
from typing import Any

from craftor.recipe import DirectTuning, ObjectEncoder, Recipe, RewardTuning

SCHEME = "micro:"


def locate(path: str) -> str:
    """Resolve `micro:` paths. Raises ValueError that lists what is shipped when the name is not."""
    if not path.startswith(SCHEME):
        return path
    package = Path(str(files("craftor_micro")))
    shipped = {p.name: p for folder in ("weights", "prompts") for p in sorted((package / folder).glob("[a-z]*"))}
    name = path.removeprefix(SCHEME)
    if name not in shipped:
        raise ValueError(f"{path}: not shipped with craftor_micro; available: {', '.join(SCHEME + n for n in shipped)}")
    return str(shipped[name])


def shipped_recipe(name: str) -> Path:
    """A recipe that comes with craftor: inside the installed package, or in `recipes/` of a checkout."""
    package = Path(str(files("craftor")))
    return next(p for p in (package / "recipes" / name, package.parents[1] / "recipes" / name) if p.is_file())


def absolute(recipe: Recipe) -> Recipe:
    """The same recipe with local paths made absolute: Ray workers have another working directory."""

    def fix(path: str) -> str:
        return str(Path(path).resolve()) if Path(path).exists() else path

    task, evaluation, encoder = recipe.task, recipe.evaluation, recipe.model.text_encoder
    search, validation = recipe.search, recipe.validation
    if isinstance(task, RewardTuning | DirectTuning):
        rewards = {name: r.model_copy(update={"weights": fix(r.weights)}) for name, r in task.rewards.items()}
        task = task.model_copy(update={"rewards": rewards})
    if isinstance(task, RewardTuning) and task.prefix.cache is not None:
        prefix = task.prefix.model_copy(update={"cache": fix(task.prefix.cache)})
        task = task.model_copy(update={"prefix": prefix})
    if isinstance(task, RewardTuning) and task.shown is not None:
        places: dict[str, Any] = {key: fix(getattr(task.shown, key)) for key in ("encoder", "references")}
        if (identity := task.shown.identity) is not None:
            places["identity"] = identity.model_copy(update={"weights": fix(identity.weights)})
        task = task.model_copy(update={"shown": task.shown.model_copy(update=places)})
    if isinstance(task, ObjectEncoder):
        found: dict[str, Any] = {
            "image_encoder": fix(task.image_encoder),
            "adapter": task.adapter and fix(task.adapter),
        }
        if (features := task.features) is not None:
            found["features"] = features.model_copy(update={"weights": fix(features.weights)})
        task = task.model_copy(update=found)
    if evaluation is not None:
        evaluation = evaluation.model_copy(update={"prompts": fix(evaluation.prompts)})
    if validation is not None:
        validation = validation.model_copy(update={"prompts": fix(validation.prompts)})
    if search is not None:
        search = search.model_copy(update={"prompts": fix(search.prompts)})
    storage = recipe.run.storage
    if storage is not None and "://" not in storage:
        storage = str(Path(storage).resolve())
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(
                update={"path": fix(recipe.model.path), "text_encoder": encoder and fix(encoder)}
            ),
            "run": recipe.run.model_copy(update={"storage": storage}),
            "data": recipe.data.model_copy(update={"path": fix(recipe.data.path)}),
            "task": task,
            "evaluation": evaluation,
            "validation": validation,
            "search": search,
        }
    )
