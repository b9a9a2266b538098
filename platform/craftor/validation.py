"""Complete checkpoints -> their scores on held-out prompts, by Ray tasks beside the training workers.

Ray Train starts and follows the tasks, one at a time; one that was due when a run ended is made up for when it goes on.
A worker reports a pointer, for our checkpoints lie in the run's own folder. The scores are `validations/step-*.json`
there, and under `validation/` in MLflow.
"""

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

import ray.train
from ray.train import Checkpoint, CheckpointUploadMode, ValidationConfig, ValidationTaskConfig

from craftor import checkpoint, storage
from craftor.evaluate import held_out_prompts, used_steps
from craftor.evaluation_actor import Scorer
from craftor.recipe import Evaluation, Recipe, Tuning
from craftor.run_files import VALIDATIONS, note, write_json
from craftor.trainable import CLASSES, LORA_FOLDER

POINTER = "checkpoint.json"
BATCH = 8
"""Prompts whose images are made at once."""
NO_SCORES = {"number", "prompt", "seed", "variant", "feature", "png"}


def config(recipe: Recipe, run_dir: Path) -> ValidationConfig | None:
    """How Ray Train validates the run's checkpoints, if it is to."""
    if recipe.validation is None:
        return None
    settings, evaluation = recipe.validation, _for_scorer(recipe).evaluation
    assert evaluation is not None
    return ValidationConfig(
        fn=validate,
        task_config=ValidationTaskConfig(
            fn_kwargs={
                "recipe": recipe.data_of(),
                "run_dir": str(run_dir.resolve()),
                "rows": held_out_prompts(evaluation, "validation"),
            },
            timeout_s=settings.timeout_s,
        ),
        ray_remote_kwargs={
            "num_cpus": settings.num_cpus,
            "num_gpus": settings.num_gpus,
            "resources": settings.resources,
        },
    )


def report(step: int | None) -> None:
    """Hand the checkpoint of `step` to Ray Train, which validates it; all workers call it together, one with a step."""
    if step is None:
        ray.train.report({}, checkpoint_upload_mode=CheckpointUploadMode.ASYNC)
        return
    folder = tempfile.mkdtemp(prefix="craftor-pointer-")  # removed after its upload
    write_json(Path(folder) / POINTER, {"step": step})
    ray.train.report(
        {"step": step},
        checkpoint=Checkpoint.from_directory(folder),
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        validation=True,
    )


def validate(
    pointer: Checkpoint, *, recipe: dict[str, Any], run_dir: str, rows: list[dict[str, Any]]
) -> dict[str, float]:
    """The task: score a checkpoint, write its file, return the tuned model's means for Ray Train's own records."""
    with pointer.as_directory() as folder:
        step = json.loads((Path(folder) / POINTER).read_text())["step"]
    settings, began = Recipe.model_validate(recipe), time.monotonic()
    with _checkpoint(settings.run.storage, Path(run_dir), step) as parts:
        scores = measure(settings, parts, rows)
    found = {"step": step, "seconds": time.monotonic() - began, "metrics": scores}
    with tempfile.TemporaryDirectory() as folder:
        name = f"{VALIDATIONS}/{checkpoint.folder_name(step)}.json"
        own = Path(folder if settings.run.storage else run_dir) / name
        own.parent.mkdir(exist_ok=True)
        write_json(own, found)
        if settings.run.storage is not None:
            storage.put(own, f"{settings.run.storage}/{name}")
    return {f"validation/{name}": value["tuned"] for name, value in scores.items()}


@contextmanager
def _checkpoint(url: str | None, run_dir: Path, step: int) -> Iterator[Path]:
    """The checkpoint's folder; of one on a URL, a copy of what a pipeline reads."""
    if url is None:
        yield run_dir / "checkpoints" / checkpoint.folder_name(step)
        return
    with tempfile.TemporaryDirectory() as folder:
        for part in (*CLASSES, LORA_FOLDER):
            storage.get(f"{url}/checkpoints/{checkpoint.folder_name(step)}/{part}", Path(folder) / part)
        yield Path(folder)


def measure(recipe: Recipe, parts: Path, rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Means over the prompts' images by metric: of the base, of what is tuned, and their difference."""
    recipe = _for_scorer(recipe)
    assert recipe.evaluation is not None and isinstance(recipe.task, Tuning)
    tuned = {"folder": str(parts), "weight": recipe.evaluation.weight, "steps": list(used_steps(recipe))}
    scorer = Scorer(recipe.data_of(), {"tuned": [tuned]}, num_kept=0, num_strips=0)
    images = [image for start in range(0, len(rows), BATCH) for image in scorer.images(rows[start : start + BATCH])]
    scores = {}
    for name in sorted(images[0].keys() - NO_SCORES):
        base, own = (
            [image[name] for image in images if image["variant"] == variant and image[name] is not None]
            for variant in ("base", "tuned")
        )
        if base and own:
            scores[name] = {"base": mean(base), "tuned": mean(own), "delta": mean(own) - mean(base)}
    return scores


def _for_scorer(recipe: Recipe) -> Recipe:
    """The recipe that evaluates as `[validation]` says, with what its task has of the machine."""
    settings, given = recipe.validation, recipe.evaluation
    assert settings is not None
    evaluation = Evaluation(
        prompts=settings.prompts,
        num_prompts=settings.num_prompts,
        num_seeds=settings.num_seeds,
        use_from=given.use_from if given else None,
        weight=given.weight if given else 1.0,
    )
    threads = max(1, int(settings.num_cpus))
    workers = recipe.workers.model_copy(update={"gpu": settings.num_gpus > 0, "threads": threads})
    return recipe.model_copy(update={"evaluation": evaluation, "workers": workers})


def read(run_dir: Path) -> list[dict[str, Any]]:
    """What has been found of a run's checkpoints, by step."""
    return [json.loads(path.read_text()) for path in sorted((run_dir / VALIDATIONS).glob("step-*.json"))]


def collect(recipe: Recipe, run_dir: Path) -> None:
    """Bring what tasks have found into the run's folder; note the checkpoints of which nothing was found."""
    if (url := recipe.run.storage) is not None:
        storage.get(f"{url}/{VALIDATIONS}", run_dir / VALIDATIONS)
    found = {line["step"] for line in read(run_dir)}
    for folder in sorted((run_dir / "checkpoints").glob("step-*")):
        if (step := checkpoint.step_of(folder)) not in found:
            note(run_dir, f"the checkpoint of step {step} was not validated: its task failed, or took too long")
