"""Checkpoints of sharded modules: each worker writes its own shards, worker 0 makes Hugging Face folders of them.

`trainer/shards/` holds one safetensors file a worker, by torch.distributed.checkpoint in the format whose index is in
the files' own headers: no pickle. Any number of workers reads them, one included.
"""

import copy
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor, distribute_tensor

from craftor import checkpoint, storage
from craftor.sharding import kept

SHARDS = "shards"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Of AdamW's state; the number of steps is that of the checkpoint."""


def write(
    folder: Path, module: nn.ModuleDict, optimizer: torch.optim.Optimizer, average: dict[str, Tensor] | None
) -> None:
    """This worker's shards; all call it together. Raises OSError on all of them where one cannot write."""
    tensors = _named(module, optimizer, average)
    try:
        # One file for each worker: of the default, one name for all of them, the last would be left.
        writer = HuggingFaceStorageWriter(str(folder / "trainer" / SHARDS), save_distributed=True)
        dcp.save(tensors, storage_writer=writer)
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        if not all(isinstance(cause, OSError) for cause in causes):
            raise
        raise OSError(f"{folder}: worker {min(error.failures)}: {causes[0]}") from error


def clear(url: str) -> None:
    """Remove what an attempt to save the checkpoint of this URL has left, of other workers perhaps."""
    filesystem, path = storage.open_url(url)
    if storage.retried(lambda: filesystem.exists(path)):
        storage.retried(lambda: filesystem.rm(path, recursive=True))


def hand_over(folder: Path, url: str) -> None:
    """Upload this worker's shards to the checkpoint's URL, where worker 0, which has its own, can fetch them.

    All workers call it together. Raises OSError on all of them where one cannot upload.
    """
    error: BaseException | None = None
    if torch.distributed.get_rank():
        try:
            storage.put(folder / "trainer" / SHARDS, f"{url}/trainer/{SHARDS}")
        except storage.failures() as raised:
            error = raised
        shutil.rmtree(folder)
    said: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(said, error and str(error))
    for rank, reason in enumerate(said):
        if reason is not None:
            raise OSError(f"{url}: worker {rank}: {reason}") from error


def fetch(folder: Path, url: str) -> None:
    """Worker 0: complete its own shards by those that were handed over."""
    filesystem, source = storage.open_url(f"{url}/trainer/{SHARDS}")
    for path in storage.retried(lambda: filesystem.find(source)):
        storage.get_file(filesystem, path, folder / "trainer" / SHARDS / path.rsplit("/", 1)[1])


def restore(
    folder: Path, module: nn.ModuleDict, optimizer: torch.optim.Optimizer, average: dict[str, Tensor] | None
) -> int:
    """Load weights, moments and average in place, each sharded or whole here as in the files; the number of steps done.

    Raises ValueError where the files are not of what trains.
    """
    checkpoint.verify(folder)
    step = checkpoint.step_of(folder)
    for parameter in checkpoint.trained(module).values():
        moments = {key: torch.zeros_like(parameter.detach()) for key in MOMENTS}
        optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}
    tensors = _named(module, optimizer, average)
    if (folder / "trainer" / SHARDS).is_dir():
        reader = _reader(folder)
        _require(folder, tensors, reader.read_metadata().state_dict_metadata)
        dcp.load(tensors, storage_reader=reader)
    else:
        frozen = {f"module/{name}" for name in kept(module).keys() - checkpoint.trained(module).keys()}
        _load_whole(folder, {key: tensor for key, tensor in tensors.items() if key not in frozen})
    return step


def _load_whole(folder: Path, tensors: dict[str, Tensor]) -> None:
    """From the files of `checkpoint`, which have only what trains; each worker takes its shard."""
    found = {
        f"{kind}/{name.replace('::', '/')}": value
        for kind in dict.fromkeys(key.split("/")[0] for key in tensors)
        for name, value in load_file(folder / "trainer" / f"{kind}.safetensors").items()
    }
    _require(folder, tensors, found)
    for key, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            value = found[key].to(tensor.device)
            tensor.copy_(distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None))
        else:
            tensor.copy_(found[key])


def _require(folder: Path, tensors: Mapping[str, Tensor], found: Mapping[str, object]) -> None:
    if missing := sorted(tensors.keys() - found.keys()):
        raise checkpoint.CheckpointError(f"{folder}: its weights are not those that train: it lacks {missing}")


def consolidate(folder: Path, blank: nn.ModuleDict, *, averaged: bool) -> nn.ModuleDict:
    """What trains, whole and on the CPU: `blank` with the weights of the shards, those of the average if there is one.

    It reads files alone: worker 0 does it while all train on.
    """
    moving = checkpoint.trained(blank).keys() if averaged else ()
    keys = {name: f"average/{name}" if name in moving else f"module/{name}" for name in kept(blank)}
    weights = {name: torch.empty_like(p, device="cpu") for name, p in kept(blank).items()}
    dcp.load({keys[name]: weights[name] for name in keys}, storage_reader=_reader(folder), no_dist=True)
    whole = copy.deepcopy(blank)
    whole.load_state_dict(weights, strict=False, assign=True)
    return whole


def _reader(folder: Path) -> HuggingFaceStorageReader:
    return HuggingFaceStorageReader(str(folder / "trainer" / SHARDS))


def _named(
    module: nn.ModuleDict, optimizer: torch.optim.Optimizer, average: dict[str, Tensor] | None
) -> dict[str, Tensor]:
    """Everything by the name that it has in the files."""
    tensors = {f"module/{name}": parameter.detach() for name, parameter in kept(module).items()}
    for name, parameter in checkpoint.trained(module).items():
        tensors |= {f"optimizer/{name}/{key}": optimizer.state[parameter][key] for key in MOMENTS}
    return tensors | {f"average/{name}": value for name, value in (average or {}).items()}
