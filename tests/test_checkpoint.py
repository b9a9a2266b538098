"""A checkpoint is whole or not there; what is restored is what was saved, bit for bit."""

from pathlib import Path

import pytest
import torch
from torch import nn

from craftor import checkpoint
from craftor.checkpoint import CheckpointError


def trained(steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    for step in range(steps):
        one_step(module, optimizer, step)
    return module, optimizer


def one_step(module: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
    optimizer.zero_grad()
    module(inputs).square().mean().backward()
    optimizer.step()


def save(run: Path, step: int, module: nn.Module, optimizer: torch.optim.Optimizer) -> Path:
    return checkpoint.save(
        run,
        step,
        save_module=lambda folder: (folder / "unet").mkdir(),
        module=module,
        optimizer=optimizer,
        average=None,
        state={"recipe": {}},
    )


def test_resuming_equals_never_stopping(tmp_path: Path) -> None:
    save(tmp_path, 3, *trained(3))
    module, optimizer = trained(0)
    folder = checkpoint.latest(tmp_path)
    assert folder is not None
    assert checkpoint.restore(folder, module=module, optimizer=optimizer, average=None) == 3
    for step in range(3, 6):
        one_step(module, optimizer, step)
    expected, _ = trained(6)
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in module.state_dict().items())


def test_any_layout_is_saved_and_found_again(tmp_path: Path) -> None:
    """Images with channels last have weights, averages and moments to match."""

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        module = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        return module, torch.optim.AdamW(module.parameters(), lr=1e-2)

    module, optimizer = fresh()
    module(torch.ones(1, 3, 5, 5)).sum().backward()
    optimizer.step()
    average = {name: p.detach().clone() for name, p in module.named_parameters()}
    folder = checkpoint.save(
        tmp_path,
        1,
        save_module=lambda folder: (folder / "unet").mkdir(),
        module=module,
        optimizer=optimizer,
        average=average,
        state={"recipe": {}},
    )
    again, again_optimizer = fresh()
    again_average = {name: torch.zeros_like(value) for name, value in average.items()}
    checkpoint.restore(folder, module=again, optimizer=again_optimizer, average=again_average)
    assert all(torch.equal(value, again_average[name]) for name, value in average.items())
    for parameter, same in zip(module.parameters(), again.parameters(), strict=True):
        saved, found = optimizer.state[parameter], again_optimizer.state[same]
        assert torch.equal(parameter, same) and all(torch.equal(value, found[key]) for key, value in saved.items())
        assert found["exp_avg"].stride() == same.stride()


def test_a_half_written_checkpoint_is_never_read(tmp_path: Path) -> None:
    whole = save(tmp_path, 3, *trained(3))
    half = tmp_path / "checkpoints" / ".writing-step-000006"
    (half / "trainer").mkdir(parents=True)
    (half / "trainer" / "module.safetensors").write_bytes(b"half")
    assert checkpoint.latest(tmp_path) == whole
    # Nor one whose manifest never came, whatever its name.
    half.rename(half.with_name("step-000006"))
    assert checkpoint.latest(tmp_path) == whole


def test_a_changed_file_is_refused_by_name(tmp_path: Path) -> None:
    folder = save(tmp_path, 3, *trained(3))
    (folder / "trainer" / "state.json").write_text('{"step": 4}')
    module, optimizer = trained(0)
    with pytest.raises(CheckpointError, match=r"trainer/state\.json: missing or changed"):
        checkpoint.restore(folder, module=module, optimizer=optimizer, average=None)


def test_weights_of_something_else_are_refused_by_name(tmp_path: Path) -> None:
    folder = save(tmp_path, 3, *trained(3))
    module = nn.Sequential(nn.Linear(3, 4))
    with pytest.raises(CheckpointError, match=r"not those that train: \['1\.bias', '1\.weight'\]"):
        checkpoint.restore(folder, module=module, optimizer=torch.optim.AdamW(module.parameters()), average=None)


def test_saving_again_replaces(tmp_path: Path) -> None:
    save(tmp_path, 3, *trained(3))
    folder = save(tmp_path, 3, *trained(4))
    checkpoint.verify(folder)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]
