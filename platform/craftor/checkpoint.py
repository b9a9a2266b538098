"""Checkpoints: Hugging Face layout plus `trainer/`, safetensors only, complete or not there at all.

`checkpoints/step-000050/` holds the trained parts (`text_encoder/`, `unet/`, `lora/`), `trainer/` (weights, optimiser,
`state.json`; what is sharded as `sharded_checkpoint` has it) and `manifest.json` with the sha256 of every other file.
It is written under a temporary name and renamed, so a half-written checkpoint never has the name of a whole one.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

MANIFEST, WRITING = "manifest.json", ".writing-"


class CheckpointError(ValueError):
    """A checkpoint that is not what was written, or not of what trains; the message names the file or the weights."""


def save(
    run_dir: Path,
    step: int,
    *,
    save_module: Callable[[Path], None],
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: dict[str, Tensor] | None,
    state: dict,
) -> Path:
    """Write the checkpoint after `step` optimiser steps; `average` is the moving average of the weights, if kept."""
    folder = begin(run_dir, step)
    write(folder, step, save_module=save_module, module=module, optimizer=optimizer, average=average, state=state)
    return complete(folder)


def begin(run_dir: Path, step: int) -> Path:
    """An empty folder under a temporary name."""
    folder = unfinished(run_dir, step)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "trainer").mkdir(parents=True)
    return folder


def unfinished(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step is until it is complete."""
    return run_dir / "checkpoints" / f"{WRITING}{folder_name(step)}"


def folder_name(step: int) -> str:
    """Of a complete checkpoint."""
    return f"step-{step:06d}"


def write(
    folder: Path,
    step: int,
    *,
    save_module: Callable[[Path], None],
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: dict[str, Tensor] | None,
    state: dict,
) -> None:
    """Fill it from the live modules; what follows needs them no more."""
    save_module(folder)
    save_file(_optimizer_tensors(module, optimizer), folder / "trainer" / "optimizer.safetensors")
    weights = {name: p.detach().contiguous() for name, p in trained(module).items()}
    save_file(weights, folder / "trainer" / "module.safetensors")
    if average is not None:
        save_file(
            {name: value.contiguous() for name, value in average.items()}, folder / "trainer" / "average.safetensors"
        )
    write_state(folder, step, state)


def write_state(folder: Path, step: int, state: dict) -> None:
    (folder / "trainer" / "state.json").write_text(json.dumps({**state, "step": step}, indent=2))


def complete(folder: Path) -> Path:
    """Hash, push to the disk, and give it its name, replacing a checkpoint of the same step."""
    final = folder.with_name(folder.name.removeprefix(WRITING))
    (folder / MANIFEST).write_text(json.dumps(digests(folder), indent=2))
    _sync(folder)
    shutil.rmtree(final, ignore_errors=True)
    folder.rename(final)
    _sync_one(final.parent)
    return final


def restore(
    folder: Path, *, module: nn.Module, optimizer: torch.optim.Optimizer, average: dict[str, Tensor] | None
) -> int:
    """Load weights, optimiser state and average in place; returns the number of steps done.

    Raises CheckpointError where a file has changed, or where the weights are not those that train.
    """
    verify(folder)
    parameters, weights = trained(module), load_file(folder / "trainer" / "module.safetensors")
    if weights.keys() != parameters.keys():
        raise CheckpointError(
            f"{folder}: its weights are not those that train: {sorted(weights.keys() ^ parameters.keys())}"
        )
    tensors = load_file(folder / "trainer" / "optimizer.safetensors")
    for name, parameter in parameters.items():
        parameter.data.copy_(weights[name])
        prefix = f"{name}::"
        found = {
            key.removeprefix(prefix): _as(parameter, value) for key, value in tensors.items() if key.startswith(prefix)
        }
        if found:
            optimizer.state[parameter] = found
    if average is not None:
        for key, value in load_file(folder / "trainer" / "average.safetensors").items():
            average[key].copy_(value)
    return step_of(folder)


def _as(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """An optimiser's tensor on its parameter's device and in its layout, where the step works with both."""
    return torch.empty_like(parameter).copy_(value) if value.shape == parameter.shape and value.ndim else value


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """What trains of a module, by name: all of it, or LoRA's matrices."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def latest(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    return max(complete_ones(run_dir), default=None)


def complete_ones(run_dir: Path) -> list[Path]:
    """A run's checkpoints that may be read, oldest first."""
    return sorted(path for path in (run_dir / "checkpoints").glob("step-*") if (path / MANIFEST).exists())


def step_of(folder: Path) -> int:
    """Optimiser steps done when a checkpoint was written."""
    return json.loads((folder / "trainer" / "state.json").read_text())["step"]


def verify(folder: Path) -> None:
    """Raises CheckpointError naming the file whose sha256 is not that of the manifest."""
    expected = json.loads((folder / MANIFEST).read_text())
    for name, digest in expected.items():
        if not (folder / name).is_file() or _sha256(folder / name) != digest:
            raise CheckpointError(f"{folder / name}: missing or changed since the checkpoint was written")


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file under a folder but the manifest itself."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {str(path.relative_to(folder)): _sha256(path) for path in files}


def _optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}::{key}": value.detach().contiguous()
        for name, parameter in trained(module).items()
        for key, value in optimizer.state[parameter].items()
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    """Push a folder's files and names to the disk, so that a rename never outruns the data."""
    for path in [*folder.rglob("*"), folder]:
        _sync_one(path)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
