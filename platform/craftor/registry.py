"""Tuned encoders in the MLflow Model Registry: a bundle of safetensors, checked by hash, never executed.

A bundle is `text_encoder/` + `tokenizer/` + `encoder.toml` (base model and its hash, rewards and weights, timesteps of
the window) + `manifest.json` (sha256 of each file). It is an MLflow logged model with a flavor of our own, so that no
generic loader of MLflow ever unpickles or imports anything for it.
"""

import hashlib
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
SHA256 = "craftor.sha256"
"""Tag of a version: the hash of its weights, which also marks it as ours."""
_ALLOWED = ("encoder.toml", checkpoint.MANIFEST, "MLmodel")
_ALLOWED_FOLDERS = {
    "text_encoder": (".json", ".safetensors"),
    "text_encoder_2": (".json", ".safetensors"),
    "unet": (".json", ".safetensors"),
    "lora": (".safetensors",),
    "tokenizer": (".json", ".txt"),
    "tokenizer_2": (".json", ".txt"),
}


class BundleError(ValueError):
    """A folder that is not, or not any more, the encoder bundle it should be."""


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
    # Step i takes the latents from timestep i to the one after: the window ends where the first step outside begins.
    timesteps = [*(step.timestep for step in diffuser.guided(rollout).schedule), -1]
    return {
        "name": recipe.name,
        "craftor": __version__,
        "base": {"model": recipe.model.path, "text_encoder_sha256": weights_digest([diffuser.text_encoder])},
        "rewards": {name: {"kind": r.kind, "weight": r.weight} for name, r in rewards.items() if r.weight},
        "window": {"first_timestep": timesteps[steps.start], "last_timestep": timesteps[steps.stop] + 1},
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
        tags = {"craftor.run": recipe.name, SHA256: weights_sha256(bundle)}
        version = mlflow.register_model(f"models:/{model.model_id}", name, tags=tags)
    for alias in recipe.register_as.aliases:
        connected.set_registered_model_alias(name, alias, version.version)
    return {"name": name, "version": str(version.version)}


def fetch(uri: str, out: Path, store: str | None = None) -> Path:
    """Copy a registered bundle (`models:/name@alias` or `models:/name/3`) to `out`, refusing anything unexpected.

    `store` is the MLflow store's URI, by default the current one. Raises BundleError naming a file that is not on the
    allow-list or whose sha256 is not that of the manifest.
    """
    shutil.rmtree(out, ignore_errors=True)
    download(uri, out, store)
    (out / "registered_model_meta").unlink(missing_ok=True)  # MLflow's note of where it came from
    verify_bundle(out)
    return out


def download(uri: str, out: Path, store: str | None = None) -> Path:
    """A model's files, or one of them, in `out`: without a destination MLflow may give the store's own folder."""
    return Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(out), tracking_uri=store, registry_uri=store))


def verify_bundle(folder: Path) -> None:
    """Allow-listed file names only, each with the hash of the manifest. Raises BundleError naming the first other."""
    for needed in ("encoder.toml", checkpoint.MANIFEST):
        if not (folder / needed).is_file():
            raise BundleError(f"{folder}: not an encoder bundle (no {needed})")
    try:
        listed = json.loads((folder / checkpoint.MANIFEST).read_text())
        checkpoint.verify(folder)
    except ValueError as error:
        raise BundleError(str(error)) from None
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = PurePosixPath(path.relative_to(folder))
        inside = len(name.parts) == 2 and name.suffix in _ALLOWED_FOLDERS.get(name.parts[0], ())
        known = str(name) in listed or str(name) in (checkpoint.MANIFEST, "MLmodel")
        if not known or (str(name) not in _ALLOWED and not inside):
            raise BundleError(f"{path}: not a file of an encoder bundle")


def weights_sha256(folder: Path) -> str:
    """The identity of a bundle's weights, from its manifest: names and hashes of the safetensors files."""
    listed = json.loads((folder / checkpoint.MANIFEST).read_text())
    lines = [f"{name} {digest}\n" for name, digest in sorted(listed.items()) if name.endswith(".safetensors")]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
