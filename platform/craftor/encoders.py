"""A name in the registry, or a bundle's folder -> a tuned text encoder, checked against its base and ready to mix.

An alias is resolved to a version once, and everything after speaks of that version and the hash of its weights.
Loading executes nothing: allow-listed files with the manifest's hashes, safetensors, the shapes and the tokenizer of
the base, then one probe prompt.
"""

import hashlib
import json
import os
import re
import tempfile
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mlflow.entities.model_registry import RegisteredModel
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from craftor import checkpoint, registry, trainable
from craftor.diffuser import Diffuser, tokenize
from craftor.prefix_cache import weights_digest
from craftor.tracking import TrackingUnreachable

PROBE = ["a photograph of an astronaut riding a horse", ""]
_REFERENCE = re.compile(r"(?:models:/)?(?P<name>[^/@:'\"]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))?")
_WIDTHS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings")


class UnknownEncoder(ValueError):
    """No such name, alias or version in the registry; the message lists those there are."""


class EncoderRefused(ValueError):
    """A bundle that must not be used with this base; the message says what does not fit."""


@dataclass(frozen=True)
class Version:
    """One version of a registered encoder. Aliases move; this does not."""

    name: str
    version: str
    run_id: str | None
    aliases: tuple[str, ...]
    """Those that named it when it was looked up."""
    tags: dict[str, str]
    created: int
    """Milliseconds since 1970."""
    store: str
    """The MLflow store's URI."""

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.version}"


@dataclass(frozen=True)
class Encoder:
    """A tuned text encoder, frozen and on the base's device."""

    name: str
    version: str | None
    """None for a bundle that came from a folder."""
    uri: str
    sha256: str
    """Of the weights: equal hashes and equal bases make equal embeddings."""
    run_id: str | None
    modules: Mapping[str, CLIPTextModel | CLIPTextModelWithProjection]
    """`text_encoder`, or in SDXL `text_encoder_2` or both: what stands in for the base's parts of these names."""
    window: tuple[int, int]
    """(first, last) timestep in which it acts unless told otherwise, both included; first is the noisier one."""
    description: dict[str, Any]
    """`encoder.toml`."""

    @property
    def part(self) -> str:
        """The part it tunes; the first, where it tunes both of SDXL's."""
        return next(iter(self.modules))

    @property
    def module(self) -> CLIPTextModel | CLIPTextModelWithProjection:
        return self.modules[self.part]


def versions(connected: MlflowClient) -> list[Version]:
    """Every registered encoder, by name, newest version first. Raises TrackingUnreachable."""
    try:
        models = connected.search_registered_models(max_results=1000)
        return [version for model in models for version in _versions_of(connected, model)]
    except MlflowException as error:
        raise _unreachable(connected, error) from error


def resolve(connected: MlflowClient, text: str) -> Version:
    """`name` (its newest version), `name@alias` or `name/3`, with or without `models:/` -> that version.

    Raises UnknownEncoder listing what there is, TrackingUnreachable when the server does not answer.
    """
    parsed = _REFERENCE.fullmatch(text)
    if parsed is None:
        raise UnknownEncoder(f"{text!r}: expected name, name@alias or name/version")
    name, alias, number = parsed["name"], parsed["alias"], parsed["version"]
    try:
        there = _versions_of(connected, connected.get_registered_model(name))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise _unreachable(connected, error) from error
        there = []
    if not there:
        names = ", ".join(dict.fromkeys(v.name for v in versions(connected)))
        raise UnknownEncoder(f"no encoder {name!r} in the registry; there are: {names or 'none'}")
    for found in there:
        if number in (None, found.version) and (alias is None or alias in found.aliases):
            return found
    known = [*(f"@{alias}" for v in there for alias in v.aliases), *(f"/{v.version}" for v in there)]
    raise UnknownEncoder(f"no encoder {text!r} in the registry; of {name} there are: {', '.join(known)}")


def _versions_of(connected: MlflowClient, model: RegisteredModel) -> list[Version]:
    """Newest first. MLflow's search leaves `aliases` of versions empty; the registered model has them."""
    found = [v for v in connected.search_model_versions(f"name = '{model.name}'") if registry.SHA256 in v.tags]
    return [
        Version(
            v.name,
            str(v.version),
            v.run_id or None,
            tuple(sorted(alias for alias, version in model.aliases.items() if str(version) == str(v.version))),
            dict(v.tags),
            v.creation_timestamp,
            connected.tracking_uri,
        )
        for v in sorted(found, key=lambda v: -int(v.version))
    ]


def cache_folder() -> Path:
    """Where bundles are kept, by their content: `$CRAFTOR_CACHE/encoders`, by default under `~/.cache/craftor`."""
    return Path(os.environ.get("CRAFTOR_CACHE") or Path.home() / ".cache" / "craftor") / "encoders"


def fetch(found: Version) -> Path:
    """The verified bundle of a version in the local cache, under the hash of its manifest; downloaded once.

    Raises BundleError for a bundle that is not as it was written, EncoderRefused where its weights are not those that
    were registered, TrackingUnreachable when the store does not answer.
    """
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetching-") as temporary:
        try:
            manifest = registry.download(f"{found.uri}/{checkpoint.MANIFEST}", Path(temporary), found.store)
            kept = cache / hashlib.sha256(manifest.read_bytes()).hexdigest()
            if not kept.is_dir():
                fetched = registry.fetch(found.uri, Path(temporary) / "bundle", found.store)
                if not kept.is_dir():  # another process may have been faster
                    fetched.rename(kept)
        except MlflowException as error:
            raise TrackingUnreachable(f"{found.uri}: cannot be fetched ({str(error).splitlines()[0][:200]})") from error
    registry.verify_bundle(kept)
    if (digest := registry.weights_sha256(kept)) != found.tags.get(registry.SHA256):
        raise EncoderRefused(f"{found.uri}: its weights are {digest}, registered was {found.tags[registry.SHA256]}")
    return kept


def load_encoder(found: Version | Path, base: Diffuser, *, any_base: bool = False) -> Encoder:
    """Load a registered version or a bundle's folder as a stand-in for the base's encoder.

    Raises BundleError or EncoderRefused where anything is amiss. An encoder trained from another base's weights is
    refused too, unless `any_base`.
    """
    folder = fetch(found) if isinstance(found, Version) else found
    registry.verify_bundle(folder)
    description = tomllib.loads((folder / "encoder.toml").read_text())
    uri = found.uri if isinstance(found, Version) else str(folder.resolve())
    modules = _load_modules(folder, base, uri)
    if not any_base and weights_digest([base.text_encoder]) != description["base"]["text_encoder_sha256"]:
        raise EncoderRefused(
            f"{uri}: trained from the text encoder of {description['base']['model']}, and this base has another"
        )
    for part, module in modules.items():
        _probe(part, module, base, uri)
    window = description["window"]
    return Encoder(
        description["name"] if isinstance(found, Path) else found.name,
        found.version if isinstance(found, Version) else None,
        uri,
        registry.weights_sha256(folder),
        found.run_id if isinstance(found, Version) else description.get("run_id"),
        modules,
        (window["first_timestep"], window["last_timestep"]),
        description,
    )


def _load_modules(folder: Path, base: Diffuser, uri: str) -> dict[str, Any]:
    for part, original in base.encoders.items():
        if (folder / part).is_dir():
            config = json.loads((folder / part / "config.json").read_text())
            for key in _WIDTHS:  # before any tensor is made in these sizes
                if config.get(key) != getattr(original.config, key):
                    raise EncoderRefused(
                        f"{uri}: {part} has {key} = {config.get(key)}, the base {getattr(original.config, key)}"
                    )
        _same_tokenizer(folder / part.replace("text_encoder", "tokenizer"), base.tokenizers[part], uri)
    try:
        modules = trainable.load(base, folder)
    except (ValueError, OSError) as error:
        raise EncoderRefused(f"{uri}: {error}") from None
    if others := modules.keys() - base.encoders.keys():
        raise EncoderRefused(
            f"{uri}: tunes {', '.join(sorted(others))}; of this base can be mixed: {', '.join(base.encoders)}"
        )
    return modules


def _same_tokenizer(folder: Path, wanted: CLIPTokenizer, uri: str) -> None:
    """A bundle carries its tokenizers; one that reads prompts otherwise than the base's cannot be mixed with it."""
    if not folder.is_dir():
        return
    try:
        found = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError) as error:
        raise EncoderRefused(f"{uri}: {folder.name} does not load ({error})") from None
    same = found.get_vocab() == wanted.get_vocab() and found.model_max_length == wanted.model_max_length
    if not same or not torch.equal(tokenize(found, PROBE), tokenize(wanted, PROBE)):
        raise EncoderRefused(f"{uri}: {folder.name} is not that of the base")


@torch.no_grad()
def _probe(part: str, module: nn.Module, base: Diffuser, uri: str) -> None:
    """Numbers of the base's shape, all finite, for a prompt and for the empty one."""
    ids = tokenize(base.tokenizers[part], PROBE).to(base.device)
    found, wanted = (encoder(input_ids=ids)[0] for encoder in (module, base.encoders[part]))
    if found.shape != wanted.shape:
        raise EncoderRefused(
            f"{uri}: {part} gives {tuple(found.shape)} for the probe prompts, not {tuple(wanted.shape)}"
        )
    if not found.isfinite().all():
        raise EncoderRefused(f"{uri}: {part} gives numbers that are not finite for the probe prompts")


def _unreachable(connected: MlflowClient, error: MlflowException) -> TrackingUnreachable:
    return TrackingUnreachable(
        f"MLflow at {connected.tracking_uri} does not answer ({str(error).splitlines()[0][:200]})"
    )
