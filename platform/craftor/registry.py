"""Tuned encoders in the MLflow Model Registry: a bundle of safetensors, checked by hash, never executed.

A bundle is `text_encoder/` + `tokenizer/` + `encoder.toml` (base model and its hash, rewards and weights, timesteps of
the window) + `manifest.json` (sha256 of each file). An object encoder's has `ip_adapter.safetensors`, `image_encoder/`
and its UNet in place of the text encoder, and says so by `kind`. It is an MLflow logged model with a flavor of our own,
so that no generic loader of MLflow ever unpickles or imports anything for it.
"""

import hashlib
import io
import json
import re
import shutil
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from pathlib import Path, PurePosixPath
from typing import Any

import mlflow
import tomli_w
from mlflow.models import Model
from mlflow.tracking import MlflowClient

from craftor import __version__, checkpoint, object_adapter, object_condition
from craftor.description import OBJECT_ENCODER, describe
from craftor.diffuser import Diffuser
from craftor.recipe import Recipe
from craftor.tracking import EXPERIMENT, Tracker

FLAVOR = "craftor_encoder"
SHA256 = "craftor.sha256"
"""Tag of a version: the hash of its weights, which also marks it as ours."""
KIND = "craftor.kind"
"""Tag of a version that is not a text encoder."""
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
HELD_OUT = "craftor.held_out"
"""Tag of a version: what its evaluation found, as JSON."""
_ALLOWED = ("encoder.toml", checkpoint.MANIFEST, "MLmodel", object_adapter.FILE)
_ALLOWED_FOLDERS = {
    "text_encoder": (".json", ".safetensors"),
    "text_encoder_2": (".json", ".safetensors"),
    "unet": (".json", ".safetensors"),
    object_condition.FOLDER: (".json", ".safetensors"),
    "lora": (".safetensors",),
    "tokenizer": (".json", ".txt"),
    "tokenizer_2": (".json", ".txt"),
}


class BundleError(ValueError):
    """A folder that is not, or not any more, the encoder bundle it should be."""


def write_bundle(
    recipe: Recipe, diffuser: Diffuser, trained: Path, out: Path, lineage: Mapping[str, Any] | None = None
) -> Path:
    """Collect the trained encoder of a checkpoint, its tokenizer and its description into `out`."""
    shutil.rmtree(out, ignore_errors=True)
    for folder in (folder for folder in _ALLOWED_FOLDERS if (trained / folder).is_dir()):
        shutil.copytree(trained / folder, out / folder)
    if (trained / object_adapter.FILE).is_file():
        shutil.copy(trained / object_adapter.FILE, out / object_adapter.FILE)
    return seal(out, diffuser, {**describe(recipe, diffuser), "lineage": {"recipe": recipe.name, **(lineage or {})}})


def seal(out: Path, diffuser: Diffuser, description: Mapping[str, Any]) -> Path:
    """Add tokenizers, description and manifest to a folder of weights, which makes a bundle of it."""
    for name, tokenizer in diffuser.tokenizers.items():
        tokenizer.save_pretrained(out / name.replace("text_encoder", "tokenizer"))
    (out / "encoder.toml").write_text(tomli_w.dumps(description))
    (out / checkpoint.MANIFEST).write_text(json.dumps(checkpoint.digests(out), indent=2))
    return out


def register(connected: MlflowClient, tracker: Tracker, recipe: Recipe, bundle: Path, step: int) -> dict[str, str]:
    """Register the bundle that a run made as its recipe says; returns `{"name", "version"}`."""
    assert recipe.register_as is not None
    model, registered = add(connected, bundle, recipe.register_as.name, recipe.register_as.aliases, tracker.run_id)
    tracker.output(model, step)
    return registered


def check_name(name: str) -> None:
    """Raises BundleError for a name that no reference could hold; files are called by it, too."""
    if not re.fullmatch(NAME, name):
        raise BundleError(f"{name!r}: a name has letters, digits and ._- only, and begins with a letter or digit")


def add(
    connected: MlflowClient, bundle: Path, name: str, aliases: Sequence[str] = (), run_id: str | None = None
) -> tuple[str, dict[str, str]]:
    """Log a bundle as a model, of a run if there is one, and register it; `connected` is of `tracking.client`.

    Returns the logged model's id and `{"name", "version"}`. Raises BundleError for a name that no reference could hold.
    """
    check_name(name)
    experiment = connected.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    model = mlflow.initialize_logged_model(
        name=name,
        source_run_id=run_id,
        model_type=FLAVOR,
        experiment_id=connected.get_run(run_id).info.experiment_id if run_id else experiment.experiment_id,
    )
    with tempfile.TemporaryDirectory() as temporary:
        staging = Path(temporary) / "model"
        shutil.copytree(bundle, staging)
        card = Model(model_id=model.model_id, run_id=run_id)
        card.add_flavor(FLAVOR, version=__version__, text_encoder="text_encoder", tokenizer="tokenizer")
        card.save(str(staging / "MLmodel"))
        connected.log_model_artifacts(model.model_id, str(staging))
    connected.finalize_logged_model(model.model_id, "READY")
    with redirect_stderr(io.StringIO()):  # where MLflow says what `craftor train` says itself
        version = mlflow.register_model(f"models:/{model.model_id}", name, tags=_tags(bundle)).version
    for alias in aliases:
        connected.set_registered_model_alias(name, alias, version)
    return model.model_id, {"name": name, "version": str(version)}


def _tags(bundle: Path) -> dict[str, str]:
    """What a list of versions shows without fetching each."""
    description = description_of(bundle)
    window, lineage = description["window"], description.get("lineage", {})
    tags = {
        SHA256: weights_sha256(bundle),
        "craftor.run": lineage.get("recipe", description["name"]),
        "craftor.base": description["base"]["model"],
        "craftor.window": f"{window['first_timestep']}..{window['last_timestep']}",
    }
    if digest := lineage.get("dataset_sha256"):
        tags["craftor.dataset"] = digest
    if description.get("kind") == OBJECT_ENCODER:
        tags |= {KIND: OBJECT_ENCODER, "craftor.domain": description["object"]["domain"]}
    return tags


def score(connected: MlflowClient, registered: Mapping[str, str], metrics: Mapping[str, Mapping[str, Any]]) -> None:
    """Tag a version with its held-out scores: `evaluate`'s metrics, rounded, without what only a report needs."""
    scores = {
        name: {
            **{key: float(f"{row[key]:.5g}") for key in ("base", "tuned", "delta")},
            "ci95": [float(f"{bound:.5g}") for bound in row["ci95"]],
            "win_rate": round(row["win_rate"], 3),
            "held_out": row["held_out"],
        }
        for name, row in metrics.items()
    }
    connected.set_model_version_tag(registered["name"], registered["version"], HELD_OUT, json.dumps(scores))


def fetch(uri: str, out: Path, store: str | None = None) -> Path:
    """Copy a bundle (`models:/name@alias`, `models:/name/3`, an artifact's URI) to `out`, refusing anything unexpected.

    `store` is the MLflow store's URI, by default the current one, which `models:/` always means. Raises BundleError
    naming a file that is not on the allow-list or whose sha256 is not that of the manifest.
    """
    with tempfile.TemporaryDirectory() as temporary:
        found = download(uri, Path(temporary), store)
        (found / "registered_model_meta").unlink(missing_ok=True)  # MLflow's note of where it came from
        shutil.rmtree(out, ignore_errors=True)
        shutil.move(found, out)
    verify_bundle(out)
    return out


def download(uri: str, out: Path, store: str | None = None) -> Path:
    """A copy below `out` of an artifact; without a destination MLflow may give the store's own folder."""
    return Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(out), tracking_uri=store))


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


def description_of(folder: Path) -> dict[str, Any]:
    """A bundle's `encoder.toml`. Raises BundleError where it lacks what every use of the bundle needs."""
    path = folder / "encoder.toml"
    try:
        description = tomllib.loads(path.read_text())
        first, last = (description["window"][key] for key in ("first_timestep", "last_timestep"))
        needed = [description["name"], *(description["base"][key] for key in ("model", "text_encoder_sha256"))]
    except (OSError, KeyError, TypeError, tomllib.TOMLDecodeError) as error:
        raise BundleError(f"{path}: not the description of an encoder ({error!r})") from None
    if not all(isinstance(value, str) for value in needed):
        raise BundleError(f"{path}: name, base.model and base.text_encoder_sha256 are {needed}, expected text")
    check_name(description["name"])
    if not (isinstance(first, int) and isinstance(last, int) and 0 <= last <= first):
        raise BundleError(f"{path}: window is {first}..{last}, expected timesteps with first >= last >= 0")
    return description


def weights_sha256(folder: Path) -> str:
    """The identity of a bundle's weights, from its manifest: names and hashes of the safetensors files."""
    listed = json.loads((folder / checkpoint.MANIFEST).read_text())
    lines = [f"{name} {digest}\n" for name, digest in sorted(listed.items()) if name.endswith(".safetensors")]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
