"""Tuned encoders in the MLflow Model Registry: a bundle of safetensors, checked by hash, never executed.

A bundle is `text_encoder/` + `tokenizer/` + `encoder.toml` (base model and its hash, rewards and weights, timesteps of
the window) + `manifest.json` (sha256 of each file). It is an MLflow logged model with a flavor of our own, so that no
generic loader of MLflow ever unpickles or imports anything for it.
"""

import io
import json
import shutil
from contextlib import redirect_stderr
from pathlib import Path, PurePosixPath

import mlflow
import tomli_w
from mlflow.models import Model
from mlflow.tracking import MlflowClient

from craftor import __version__, checkpoint
from craftor.diffuser import Diffuser
from craftor.prefix_cache import weights_digest
from craftor.recipe import Recipe, Tuning
from craftor.tracking import Tracker

FLAVOR = "craftor_encoder"
_ALLOWED = ("encoder.toml", checkpoint.MANIFEST, "MLmodel")
_ALLOWED_FOLDERS = {
    "text_encoder": (".json", ".safetensors"),
    "text_encoder_2": (".json", ".safetensors"),
    "unet": (".json", ".safetensors"),
    "lora": (".safetensors",),
    "tokenizer": (".json", ".txt"),
    "tokenizer_2": (".json", ".txt"),
}


def write_bundle(recipe: Recipe, diffuser: Diffuser, trained: Path, out: Path) -> Path:
    """Collect the trained encoder of a checkpoint, its tokenizer and its description into `out`."""
    assert isinstance(recipe.task, Tuning)
    shutil.rmtree(out, ignore_errors=True)
    for folder in (folder for folder in _ALLOWED_FOLDERS if (trained / folder).is_dir()):
        shutil.copytree(trained / folder, out / folder)
    for name, tokenizer in diffuser.tokenizers.items():
        tokenizer.save_pretrained(out / name.replace("text_encoder", "tokenizer"))
    (out / "encoder.toml").write_text(tomli_w.dumps(describe(recipe, diffuser)))
    (out / checkpoint.MANIFEST).write_text(json.dumps(checkpoint.digests(out), indent=2))
    return out


def describe(recipe: Recipe, diffuser: Diffuser) -> dict:
    """The content of `encoder.toml`. The window is in timesteps, so that it means the same for any number of steps."""
    assert isinstance(recipe.task, Tuning)
    rollout, rewards = recipe.task.rollout, recipe.task.rewards
    steps = recipe.task.acts()
    timesteps = [step.timestep for step in diffuser.guided(rollout).schedule]
    return {
        "name": recipe.name,
        "craftor": __version__,
        "base": {"model": recipe.model.path, "text_encoder_sha256": weights_digest([diffuser.text_encoder])},
        "rewards": {name: {"kind": r.kind, "weight": r.weight} for name, r in rewards.items() if r.weight},
        "window": {"first_timestep": timesteps[steps.start], "last_timestep": timesteps[steps.stop - 1]},
    }


def register(connected: MlflowClient, tracker: Tracker, recipe: Recipe, bundle: Path, step: int) -> dict[str, str]:
    """Log the bundle as a model of the run and register it; returns `{"name", "version"}`."""
    assert recipe.register_as is not None
    name = recipe.register_as.name
    run = connected.get_run(tracker.run_id)
    model = mlflow.initialize_logged_model(
        name=name, source_run_id=tracker.run_id, model_type=FLAVOR, experiment_id=run.info.experiment_id
    )
    staging = bundle.parent / ".mlflow-model"
    shutil.rmtree(staging, ignore_errors=True)
    shutil.copytree(bundle, staging)
    card = Model(model_id=model.model_id, run_id=tracker.run_id)
    card.add_flavor(FLAVOR, version=__version__, text_encoder="text_encoder", tokenizer="tokenizer")
    card.save(str(staging / "MLmodel"))
    connected.log_model_artifacts(model.model_id, str(staging))
    connected.finalize_logged_model(model.model_id, "READY")
    shutil.rmtree(staging)
    tracker.output(model.model_id, step)
    with redirect_stderr(io.StringIO()):  # where MLflow says what `craftor train` says itself
        version = mlflow.register_model(f"models:/{model.model_id}", name, tags={"craftor.run": recipe.name})
    for alias in recipe.register_as.aliases:
        connected.set_registered_model_alias(name, alias, version.version)
    return {"name": name, "version": str(version.version)}


def fetch(uri: str, out: Path) -> Path:
    """Copy a registered bundle (`models:/name@alias` or `models:/name/3`) to `out`, refusing anything unexpected.

    Raises ValueError naming a file that is not on the allow-list or whose sha256 is not that of the manifest.
    """
    found = Path(mlflow.artifacts.download_artifacts(uri))
    shutil.rmtree(out, ignore_errors=True)
    # With a local store this is the store's own folder, not a copy: read it, never write there.
    shutil.copytree(found, out)
    (out / "registered_model_meta").unlink(missing_ok=True)  # MLflow's note of where it came from
    verify_bundle(out)
    return out


def verify_bundle(folder: Path) -> None:
    """Allow-listed file names only, each with the hash of the manifest."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = PurePosixPath(path.relative_to(folder))
        inside = len(name.parts) == 2 and name.suffix in _ALLOWED_FOLDERS.get(name.parts[0], ())
        if str(name) not in _ALLOWED and not inside:
            raise ValueError(f"{path}: not a file of an encoder bundle")
    checkpoint.verify(folder)
