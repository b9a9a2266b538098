"""Bundles and run folders of tiny encoders, as training leaves them, made without training."""

import copy
import functools
import json
import tempfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import tomli_w
import torch
from mlflow.tracking import MlflowClient
from torch import nn

from craftor import checkpoint, prompts, registry, tracking, trainable
from craftor.diffuser import Diffuser, load
from craftor.locate import absolute
from craftor.recipe import Recipe
from craftor.recipe import load as load_recipe
from craftor.train_settings import Part

METRICS = {
    "quality": {"base": 7.0, "tuned": 7.5, "delta": 0.5, "ci95": [0.4, 0.6], "win_rate": 0.9, "held_out": True},
    "accuracy": {"base": 0.5, "tuned": 0.51, "delta": 0.01, "ci95": [-0.1, 0.1], "win_rate": 0.5, "held_out": True},
    "total": {"base": 1.0, "tuned": 2.0, "delta": 1.0, "ci95": [0.9, 1.1], "win_rate": 1.0, "held_out": False},
}


@functools.cache
def empty_store() -> bytes:
    """An SQLite file with MLflow's tables; making them anew for each store would take seconds."""
    with tempfile.TemporaryDirectory() as folder:
        MlflowClient(f"sqlite:///{folder}/mlflow.db").search_experiments()
        return Path(folder, "mlflow.db").read_bytes()


def new_store(runs: Path) -> MlflowClient:
    """A store of its own in a new folder."""
    runs.mkdir()
    (runs / "mlflow.db").write_bytes(empty_store())
    return tracking.client(runs)


def tuned(original: nn.Module, seed: int, by: float = 0.3) -> nn.Module:
    """A copy with other weights."""
    module, generator = copy.deepcopy(original), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return module


def recipe_for(recipe_file: Path, family: str = "pipeline", **overrides: object) -> Recipe:
    recipe = load_recipe(recipe_file, {key.replace("__", "."): value for key, value in overrides.items()})
    path = Path(recipe.model.path).with_name(family)
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": str(path)})})


def write_trained(base: Diffuser, folder: Path, seed: int, parts: tuple[str, ...] = ("text_encoder",)) -> None:
    for part in parts:
        tuned(trainable.find(base, part), seed).save_pretrained(folder / part, safe_serialization=True)


def write_lora(base: Diffuser, folder: Path, parts: dict[str, Part]) -> None:
    modules = trainable.make(base, parts, seed=0)
    with torch.no_grad():
        for parameter in modules.parameters():
            if parameter.requires_grad:
                parameter.normal_(generator=torch.Generator().manual_seed(1), std=0.3)
    trainable.save(modules, parts, folder)


def make_bundle(recipe: Recipe, folder: Path, seed: int, parts: tuple[str, ...] = ("text_encoder",)) -> Path:
    base = load(recipe.model)
    write_trained(base, folder / "trained", seed, parts)
    return registry.write_bundle(recipe, base, folder / "trained", folder / "bundle", {"dataset_sha256": "d" * 64})


def make_run(recipe: Recipe, out: Path, seed: int) -> Path:
    """The folder of a finished and evaluated run, with an MLflow id that no store here knows."""
    recipe, base = absolute(recipe), load(recipe.model)
    (out / "rows").mkdir(parents=True)
    (out / "evaluation").mkdir()
    (out / "recipe.toml").write_text(tomli_w.dumps(recipe.model_dump(by_alias=True, exclude_none=True, mode="json")))
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a star", "a ring"]}), out / "rows" / "0.parquet")
    digest = prompts.describe(out / "rows").digest
    (out / "run.json").write_text(json.dumps({"mlflow_run_id": "f" * 32, "digest": digest, "seconds": 1.0}))
    (out / "metrics.jsonl").write_text("".join(json.dumps({"step": n, "loss": -n / 2}) + "\n" for n in range(1, 5)))
    (out / "evaluation" / "summary.json").write_text(json.dumps({"metrics": METRICS}))
    module = nn.Linear(1, 1)
    checkpoint.save(
        out,
        4,
        save_module=lambda folder: write_trained(base, folder, seed),
        module=module,
        optimizer=torch.optim.AdamW(module.parameters()),
        average=None,
        state={},
    )
    return out


def register(connected: MlflowClient, bundle: Path, name: str, *aliases: str) -> dict[str, str]:
    """With a run of its own in the store."""
    experiment = connected.get_experiment_by_name(tracking.EXPERIMENT)
    assert experiment is not None
    run_id = connected.create_run(experiment.experiment_id).info.run_id
    return registry.add(connected, bundle, name, aliases, run_id)[1]
