"""A method's run, a set of images: made where it is missing, gone on with where it was broken off."""

from pathlib import Path

from craftor import checkpoint, watch
from craftor.claims.methods import IMAGES, Budget, changed, recipe_of
from craftor.evaluate import Asked, Tuned, evaluate, used_steps
from craftor.job import resume, train
from craftor.locate import absolute
from craftor.recipe import Recipe, Tuning, load_run


def train_where_missing(method: str, seed: int, budget: Budget, out: Path) -> None:
    folder = run_dir(method, seed, out)
    if not (folder / "recipe.toml").exists():
        train(recipe_of(method, seed, budget, pairs(budget, out)), Path(f"claims: {method}"), folder)
    elif not _finished(folder):
        resume(folder)


def _finished(folder: Path) -> bool:
    last = checkpoint.latest(folder)
    done = checkpoint.step_of(last) if last else 0
    return done == load_run(folder).run.num_steps or (last is not None and watch.ended(folder) is not None)


def score(name: str, seed: int, budget: Budget, out: Path) -> None:
    """Score a method's images, or those of several mixed, by the first one's evaluation section."""
    folder, images = images_dir(name, seed, out), IMAGES[name]
    if (folder / "summary.json").exists():
        return
    tuned = []
    for method, weight in zip(images.methods, images.weights, strict=True):
        recipe, checkpoint_folder = last_of(out, method, seed)
        first, stop = used_steps(recipe)
        if images.use_from is not None:
            assert isinstance(recipe.task, Tuning)
            first = round(images.use_from * recipe.task.rollout.num_steps)
        tuned.append(Tuned(checkpoint_folder, weight, (first, stop)))
    asked = Asked(num_kept=8, num_strips=images.num_strips)
    evaluate(absolute(asked_recipe(name, seed, budget, out)), tuned, folder, max(1, budget.workers), asked)


def steps_between(method: str, seed: int, out: Path) -> list[int]:
    """Of the checkpoints before the last."""
    return [checkpoint.step_of(folder) for folder in checkpoint.complete_ones(run_dir(method, seed, out))[:-1]]


def score_at(step: int, method: str, seed: int, budget: Budget, out: Path) -> None:
    """Score what a checkpoint makes of the first prompts."""
    there = run_dir(method, seed, out) / "checkpoints" / checkpoint.folder_name(step)
    recipe = asked_recipe(method, seed, budget, out)
    tuned = Tuned(str(there.resolve()), 1.0, used_steps(recipe))
    score_few(tuned, recipe, images_dir(f"{method}-at-{step}", seed, out), budget)


def score_few(tuned: Tuned, recipe: Recipe, folder: Path, budget: Budget) -> None:
    """Score the first prompts, one image each, where that has not been done."""
    if not (folder / "summary.json").exists():
        few = absolute(changed(recipe.data_of(), budget.few, f"claims: images {folder.name}"))
        evaluate(few, [tuned], folder, max(1, budget.workers), Asked(num_kept=0, num_strips=0))


def asked_recipe(name: str, seed: int, budget: Budget, out: Path) -> Recipe:
    """The recipe by which images are scored."""
    recipe = recipe_of(IMAGES[name].methods[0], seed, budget, pairs(budget, out))
    changes = {f"evaluation.{key}": value for key, value in IMAGES[name].evaluation.items()}
    return changed(recipe.data_of(), changes, f"claims: images {name}") if changes else recipe


def last_of(out: Path, method: str, seed: int) -> tuple[Recipe, str]:
    """A finished run's recipe and the folder of its last checkpoint."""
    folder = run_dir(method, seed, out)
    last = checkpoint.latest(folder)
    assert last is not None, f"{folder} has been trained"
    return load_run(folder), str(last.resolve())


def run_dir(method: str, seed: int, out: Path) -> Path:
    return out / f"{method}-{seed}"


def images_dir(name: str, seed: int, out: Path) -> Path:
    return out / "images" / f"{name}-{seed}"


def pairs(budget: Budget, out: Path) -> Path:
    return Path(budget.pairs) if budget.pairs else (out / "pairs").resolve()
