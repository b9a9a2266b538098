"""Where weights are -> a folder or file on this machine, fetched if need be and not silently changed since.

`weights` is a local folder or file, a short name of `CATALOGUE`, or `owner/name` on the Hugging Face hub. What is in
the hub's cache is used as it is; nothing is fetched while HF_HUB_OFFLINE is set. Files of the catalogue are hashed once
and again whenever they were touched; what was seen is kept beside the file, in `<file>.sha256.json`.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import constants, snapshot_download
from torch import Tensor

from craftor_rewards.catalogue import CATALOGUE, TOKENIZER_FILES, Weights

_BESIDE = ("config.json", *TOKENIZER_FILES)
_SAFE = ("model*.safetensors", "model.safetensors.index.json")
_OLDER = ("pytorch_model*.bin", "pytorch_model.bin.index.json")


def find(weights: str | Path) -> Path:
    """A folder or file here, downloaded if it is public, missing and the hub may be asked.

    Raises FileNotFoundError with repository, size and the command that fetches it; ValueError when a file of the
    catalogue has not the hash it should have.
    """
    if Path(weights).exists():
        return Path(weights)
    name = str(weights)
    if (entry := entry_of(name)) is not None:
        path = _file_at(entry) if _is_address(entry) else _snapshot(entry, name) / entry.file
        verify(path, entry.sha256)
        return path.parent if entry.beside else path
    if not is_repository(weights):
        raise FileNotFoundError(missing(weights))
    failure = FileNotFoundError(missing(weights))
    for local_only, kind in itertools.product((True, False), (_SAFE, _OLDER)):
        try:
            return _download(name, name, None, (*_BESIDE, *kind), partial(_has_one, kind), local_only=local_only)
        except FileNotFoundError as error:
            failure = error
    raise failure


def is_here(name: str) -> bool:
    """Whether an entry of the catalogue and all it needs are on this machine."""
    entry = CATALOGUE[name]
    try:
        here = _address_of(entry).is_file() if _is_address(entry) else _snapshot(entry, name, local_only=True).is_dir()
    except FileNotFoundError:
        return False
    return here and all(is_here(other) for other in entry.needs)


def entry_of(weights: str) -> Weights | None:
    """The catalogue's entry of a short name, or of a repository of which it knows one file."""
    if weights in CATALOGUE:
        return CATALOGUE[weights]
    names = [name for name, entry in CATALOGUE.items() if entry.repo == weights and entry.kind != "tokenizer"]
    if len(names) > 1:
        raise ValueError(f"'{weights}' holds several weights; name one of them: {', '.join(names)}")
    return CATALOGUE[names[0]] if names else None


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a pickled one read without running anything in it.

    A checkpoint that keeps them under `state_dict` is unwrapped. Raises ValueError for anything but named tensors.
    """
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    stored = torch.load(path, map_location="cpu", weights_only=True)
    stored = stored.get("state_dict", stored) if isinstance(stored, dict) else stored
    if not isinstance(stored, dict):
        raise ValueError(f"'{path}' holds a {type(stored).__name__}; expected named tensors")
    return {name: tensor for name, tensor in stored.items() if isinstance(tensor, Tensor)}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(path: Path, expected: str | None) -> str:
    """The file's SHA-256. Raises ValueError if it is not the expected one, or not the one seen on the first load."""
    path = path.resolve()
    record, stat = path.with_name(path.name + ".sha256.json"), path.stat()
    known = json.loads(record.read_text()) if record.is_file() else None
    if known and (known["num_bytes"], known["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns):
        seen = known["sha256"]
    else:
        seen = sha256(path)
    wanted = expected or (known["sha256"] if known else seen)
    if seen != wanted:
        raise ValueError(f"'{path}' has SHA-256 {seen}; expected {wanted}: remove the file and fetch it again")
    if known is None or known["mtime_ns"] != stat.st_mtime_ns:
        text = json.dumps({"sha256": seen, "num_bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns})
        if os.access(path.parent, os.W_OK):  # a shared cache may be read-only: then each load hashes
            part = record.with_name(f"{record.name}.{os.getpid()}")
            part.write_text(text + "\n")
            part.replace(record)  # whole or not at all: several workers may load at once
    return seen


def is_repository(weights: str | Path) -> bool:
    return isinstance(weights, str) and weights.count("/") == 1 and not weights.startswith((".", "/", "~"))


def missing(weights: str | Path) -> str:
    """The one error about weights that are not here: what, how large, and the command that fetches them."""
    for name, entry in CATALOGUE.items():
        if weights in (name, entry.repo):
            source = entry.repo if _is_address(entry) else f"{entry.repo}, {entry.file}"
            return (
                f"no weights of '{name}' on this machine ({source}, {entry.gigabytes} GB, licence {entry.licence}); "
                f"`craftor rewards fetch {name}` fetches them where there is a network and HF_HUB_OFFLINE is not set"
            )
    fetch = f"hf download {weights}" if is_repository(weights) else f"hf download OWNER/NAME --local-dir {weights}"
    return (
        f"no weights at '{weights}': neither a folder, a file, a repository at hand nor one of {', '.join(CATALOGUE)}; "
        f"`{fetch}` fetches public ones"
    )


def _has_one(patterns: tuple[str, ...], folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in patterns)


def _is_address(entry: Weights) -> bool:
    return "://" in entry.repo


def _address_of(entry: Weights) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / entry.file


def _file_at(entry: Weights) -> Path:
    """The one file of an address, in torch's cache."""
    path = _address_of(entry)
    if not path.is_file():
        if constants.HF_HUB_OFFLINE:
            raise FileNotFoundError(missing(entry.repo))
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(entry.repo, str(path), hash_prefix=entry.sha256, progress=False)
        except OSError as error:
            raise FileNotFoundError(missing(entry.repo)) from error
    return path


def _snapshot(entry: Weights, name: str, *, local_only: bool = False) -> Path:
    """The folder of an entry's revision in the hub's cache, complete."""
    files = (entry.file, *entry.beside)

    def is_complete(folder: Path) -> bool:
        return all((folder / file).is_file() for file in files)

    return _download(name, entry.repo, entry.revision, files, is_complete, local_only=local_only)


def _download(
    name: str,
    repo: str,
    revision: str | None,
    files: tuple[str, ...],
    is_complete: Callable[[Path], bool],
    *,
    local_only: bool = False,
) -> Path:
    """From the network only if the cache does not have it: a load must not depend on the hub, nor change with it."""
    cause = None
    for local in (True,) if local_only else (True, False):
        try:
            folder = snapshot_download(repo, revision=revision, allow_patterns=list(files), local_files_only=local)
        except OSError as error:  # not cached; no such repository; no network; HF_HUB_OFFLINE
            cause = error
        else:
            if is_complete(Path(folder)):
                return Path(folder)
    raise FileNotFoundError(missing(name)) from cause
