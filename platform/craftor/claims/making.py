"""A method's run, images by name: made where they are missing, gone on with where they were broken off."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from craftor import checkpoint, evaluation_files, watch
from craftor.claims.methods import IMAGES, SCORED_BY, Budget, Images, changed, recipe_of
from craftor.evaluate import Asked, Tuned, make_images, used_steps
from craftor.evaluation_files import Evaluated
from craftor.job import resume, train
from craftor.locate import absolute
from craftor.recipe import Recipe, Tuning, load_run

NUM_SHOWN = 8
"""Prompts whose pictures are kept, where there are strips."""


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


def score(names: Sequence[str], seed: int, budget: Budget, out: Path) -> None:
    """Make and score images by their names in `IMAGES`, of one training seed."""
    mixtures = {name: mixture_of(IMAGES[name], seed, out) for name in names}
    score_together(mixtures, seed, budget, out)


def mixture_of(images: Images, seed: int, out: Path) -> list[Tuned]:
    """The encoders of an `IMAGES` entry; none where it is a method that needs no training."""
    tuned = []
    for method, weight in zip(images.methods, images.weights, strict=True):
        recipe, folder = last_of(out, method, seed)
        first, stop = used_steps(recipe)
        if images.use_from is not None:
            assert isinstance(recipe.task, Tuning)
            first = round(images.use_from * recipe.task.rollout.num_steps)
        tuned.append(Tuned(folder, weight, (first, stop)))
    return tuned


def steps_between(method: str, seed: int, out: Path) -> list[int]:
    """Of the checkpoints before the last."""
    return [checkpoint.step_of(folder) for folder in checkpoint.complete_ones(run_dir(method, seed, out))[:-1]]


def score_between(methods: Sequence[str], seed: int, budget: Budget, out: Path) -> None:
    """Make and score what the checkpoints of runs make of the first prompts, named METHOD-at-STEP."""
    mixtures = {}
    for method in methods:
        recipe, _ = last_of(out, method, seed)
        for step in steps_between(method, seed, out):
            there = run_dir(method, seed, out) / "checkpoints" / checkpoint.folder_name(step)
            mixtures[f"{method}-at-{step}"] = [Tuned(str(there.resolve()), 1.0, used_steps(recipe))]
    score_together(mixtures, seed, budget, out, few=True)


def score_together(
    mixtures: Mapping[str, Sequence[Tuned]], seed: int, budget: Budget, out: Path, few: bool = False
) -> None:
    """Make and score, in one evaluation, the images of those mixtures that have none yet, beside the base's.

    All are made of the same prompts and noise and scored by the reference's rewards. With `few`, of the first prompts
    alone, an image of each.
    """
    missing = [name for name in mixtures if find_images(name, seed, out) is None]
    if not missing:
        return
    beside = {key: value for name in missing if name in IMAGES for key, value in IMAGES[name].methods_beside.items()}
    changes = {"evaluation.methods": beside, **(budget.few if few else {})}
    recipe = changed(recipe_of(SCORED_BY, seed, budget, pairs(budget, out)).data_of(), changes, "claims: images")
    variants = {name: mixtures[name] for name in missing if name not in beside}
    # The same names again, after an interruption, are the same folder.
    folder = out / "images" / f"{hashlib.sha256(' '.join(missing).encode()).hexdigest()[:12]}-{seed}"
    strips = IMAGES[missing[0]].num_strips if missing[0] in IMAGES else 0
    asked = Asked(num_kept=strips and NUM_SHOWN, num_strips=strips)
    make_images(absolute(recipe), variants, folder, max(1, budget.workers), asked)


def find_images(name: str, seed: int, out: Path) -> Path | None:
    """The finished evaluation that holds images of this name; None where there is none."""
    for about in sorted((out / "images").glob(f"*-{seed}/{evaluation_files.ABOUT}")):
        said = json.loads(about.read_text())
        num_parts = len(evaluation_files.parts(said["prompts"]["num"]))
        if name in (*said["variants"], *said["methods"]) and not evaluation_files.missing(about.parent, num_parts):
            return about.parent
    return None


def read_images(name: str, seed: int, out: Path) -> Evaluated:
    """The evaluation that holds images of this name, which is there."""
    folder = find_images(name, seed, out)
    assert folder is not None, f"{name} of seed {seed} has been scored"
    return evaluation_files.read(folder)


def last_of(out: Path, method: str, seed: int) -> tuple[Recipe, str]:
    """A finished run's recipe and the folder of its last checkpoint."""
    folder = run_dir(method, seed, out)
    last = checkpoint.latest(folder)
    assert last is not None, f"{folder} has been trained"
    return load_run(folder), str(last.resolve())


def run_dir(method: str, seed: int, out: Path) -> Path:
    return out / f"{method}-{seed}"


def pairs(budget: Budget, out: Path) -> Path:
    return Path(budget.pairs) if budget.pairs else (out / "pairs").resolve()
