"""A registered version, or a folder -> a tuned text encoder, checked against its base and ready to mix.

Loading executes nothing: allow-listed files with the manifest's hashes, safetensors, the shapes and the tokenizer of
the base, then one probe prompt.
"""

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from safetensors import SafetensorError
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from craftor import checkpoint, registry, trainable
from craftor.description import OBJECT_ENCODER
from craftor.diffuser import Diffuser, tokenize
from craftor.prefix_cache import weights_digest
from craftor.storage import failures
from craftor.tracking import TrackingUnreachable, reason
from craftor.versions import UnknownEncoder, Version, resolve, versions

__all__ = ["Encoder", "EncoderRefused", "UnknownEncoder", "Version", "load_encoder", "resolve", "versions"]

PROBE = ["a photograph of an astronaut riding a horse", ""]
ARCHITECTURE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "hidden_act",
)
"""What a stand-in's configuration must share with the part it replaces."""


class EncoderRefused(ValueError):
    """A bundle that must not be used with this base; the message says what does not fit."""


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


def cache_folder() -> Path:
    """Where bundles are kept, by their content: `$CRAFTOR_CACHE/encoders`, by default under `~/.cache/craftor`."""
    return Path(os.environ.get("CRAFTOR_CACHE") or Path.home() / ".cache" / "craftor") / "encoders"


def fetch(found: Version) -> Path:
    """The verified bundle of a version in the local cache, under the hash of its manifest; downloaded once.

    Raises BundleError for a bundle that is not as it was written, EncoderRefused where its weights are not those that
    were registered, TrackingUnreachable when the store does not give it or the cache has no room for it.
    """
    # MLflow lets through what its stores of artifacts raise.
    failed: tuple[type[BaseException], ...] = (MlflowException, *failures())
    try:
        kept = _copy(found, cache_folder())
    except failed as error:
        raise TrackingUnreachable(f"{found.uri}: cannot be fetched ({reason(error)})") from error
    registry.verify_bundle(kept)
    if (digest := registry.weights_sha256(kept)) != found.tags.get(registry.SHA256):
        raise EncoderRefused(f"{found.uri}: its weights are {digest}, registered was {found.tags[registry.SHA256]}")
    return kept


def _copy(found: Version, cache: Path) -> Path:
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetching-") as temporary:
        # Not `models:/`: MLflow looks that up in its current store, whichever store it is told.
        place = MlflowClient(found.store).get_model_version_download_uri(found.name, found.version)
        manifest = registry.download(f"{place}/{checkpoint.MANIFEST}", Path(temporary), found.store)
        kept = cache / hashlib.sha256(manifest.read_bytes()).hexdigest()
        if not kept.is_dir():
            _move(registry.fetch(place, Path(temporary) / "bundle", found.store), kept)
    return kept


def _move(folder: Path, kept: Path) -> None:
    try:
        folder.rename(kept)
    except OSError:
        if not kept.is_dir():  # else another process was faster
            raise


def load_encoder(found: Version | Path, base: Diffuser, *, any_base: bool = False) -> Encoder:
    """Load a registered version or a bundle's folder as a stand-in for the base's encoder.

    Raises what `fetch` raises, and EncoderRefused where anything is amiss; OSError and torch.OutOfMemoryError are the
    machine's, and the bundle may do later. An encoder trained from another base's weights is refused too, unless
    `any_base`.
    """
    folder = fetch(found) if isinstance(found, Version) else found
    registry.verify_bundle(folder)
    description = registry.description_of(folder)
    uri = found.uri if isinstance(found, Version) else str(folder.resolve())
    if description.get("kind") == OBJECT_ENCODER:
        raise EncoderRefused(f"{uri}: an object encoder, no text encoder; use it by: craftor customize --encoder {uri}")
    modules = _load_modules(folder, base, uri)
    # A base in half precision has other numbers than the one it was rounded from: nothing to compare.
    if not any_base and base.text_encoder.dtype == torch.float32:
        wanted = description["base"]
        if weights_digest([base.text_encoder]) != wanted["text_encoder_sha256"]:
            raise EncoderRefused(f"{uri}: trained from the text encoder of {wanted['model']}; this base has another")
    for part, module in modules.items():
        probe(part, module, base, uri)
    window = description["window"]
    return Encoder(
        description["name"] if isinstance(found, Path) else found.name,
        found.version if isinstance(found, Version) else None,
        uri,
        registry.weights_sha256(folder),
        found.run_id if isinstance(found, Version) else description.get("lineage", {}).get("run_id"),
        modules,
        (window["first_timestep"], window["last_timestep"]),
        description,
    )


def pretrained(path: str) -> CLIPTextModel:
    """A text encoder's folder or hub id, or a pipeline's."""
    errors = []
    for subfolder in ("text_encoder", ""):
        try:
            module, report = CLIPTextModel.from_pretrained(
                path, subfolder=subfolder, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
        except (OSError, ValueError) as error:
            errors.append(str(error).splitlines()[0])
            continue
        if not report["missing_keys"]:
            return module
        errors.append(f"{len(report['missing_keys'])} weights missing")
    raise EncoderRefused(f"{path}: no text encoder in safetensors there ({errors[-1]})")


def plain(module: CLIPTextModel | CLIPTextModelWithProjection, name: str, base: Diffuser) -> Encoder:
    """A model that comes without description: acts at every timestep unless told otherwise."""
    part = "text_encoder_2" if isinstance(module, CLIPTextModelWithProjection) else "text_encoder"
    if part not in base.encoders:
        raise EncoderRefused(f"{name}: a {type(module).__name__}, and this pipeline has no {part}")
    check_architecture(module.config.to_dict(), part, base, name)
    module = module.to(base.device)
    probe(part, module, base, name)
    window = (base.scheduler.config.num_train_timesteps - 1, 0)
    return Encoder(name, None, name, weights_digest([module]), None, {part: module}, window, {})


def _load_modules(folder: Path, base: Diffuser, uri: str) -> dict[str, Any]:
    try:
        for part in base.encoders:
            if (folder / part).is_dir():  # before any tensor is made in these sizes
                check_architecture(json.loads((folder / part / "config.json").read_text()), part, base, uri)
            _same_tokenizer(folder / part.replace("text_encoder", "tokenizer"), base.tokenizers[part], uri)
        modules = trainable.load(base, folder)
    except EncoderRefused:
        raise
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:  # transformers has one for wrong shapes
        if of_the_machine(error):
            raise
        raise EncoderRefused(f"{uri}: {error}") from None
    if others := modules.keys() - base.encoders.keys():
        raise EncoderRefused(
            f"{uri}: tunes {', '.join(sorted(others))}; of this base can be mixed: {', '.join(base.encoders)}"
        )
    return modules


def of_the_machine(error: BaseException) -> bool:
    """Whether it says nothing of a bundle: no memory is left, or files cannot be read for now."""
    # What transformers raises for a bundle is an OSError of no number.
    of_files = isinstance(error, OSError) and error.errno not in (None, errno.ENOENT)
    return of_files or isinstance(error, torch.OutOfMemoryError)


def check_architecture(config: Mapping[str, Any], part: str, base: Diffuser, uri: str) -> None:
    """Raises EncoderRefused naming the first setting in which a stand-in differs from the base's part."""
    wanted = base.encoders[part].config
    for key in (*ARCHITECTURE, *(["projection_dim"] if part == "text_encoder_2" else [])):
        if config.get(key) != getattr(wanted, key):
            raise EncoderRefused(f"{uri}: {part} has {key} = {config.get(key)!r}, the base {getattr(wanted, key)!r}")


def _same_tokenizer(folder: Path, wanted: CLIPTokenizer, uri: str) -> None:
    """A bundle carries its tokenizers; one that reads prompts otherwise than the base's cannot be mixed with it."""
    if not folder.is_dir():
        return
    found = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    same = found.get_vocab() == wanted.get_vocab() and found.model_max_length == wanted.model_max_length
    if not same or not torch.equal(tokenize(found, PROBE), tokenize(wanted, PROBE)):
        raise EncoderRefused(f"{uri}: {folder.name} is not that of the base")


@torch.no_grad()
def probe(part: str, module: nn.Module, base: Diffuser, uri: str) -> None:
    """Finite numbers, in every layer, for a prompt and for the empty one; or EncoderRefused."""
    ids = tokenize(base.tokenizers[part], PROBE).to(base.device)
    output = module(input_ids=ids, output_hidden_states=True)
    if not all(tensor.isfinite().all() for tensor in (output[0], *output.hidden_states)):
        raise EncoderRefused(f"{uri}: {part} gives numbers that are not finite for the probe prompts")
