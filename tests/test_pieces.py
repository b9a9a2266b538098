"""The small pure modules: seeds, decode, objective, stream, layout."""

import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from craftor import objective, seeds
from craftor.decode import decode, saturated
from craftor.diffuser import load
from craftor.recipe import Model
from craftor.stream import batches

ROOT = Path(__file__).parents[1]


def test_noise_depends_on_seed_index_and_purpose_alone() -> None:
    alone = seeds.normal(1, [5], "noise", (2, 3))
    assert torch.equal(seeds.normal(1, [3, 5, 9], "noise", (2, 3))[1:2], alone)
    for other in (seeds.normal(2, [5], "noise", (2, 3)), seeds.normal(1, [5], "timestep", (2, 3))):
        assert not torch.equal(other, alone)


def test_decoded_images_are_clamped_and_their_gradient_is_not(tiny: Path) -> None:
    vae = load(Model(path=str(tiny / "pipeline"))).vae
    latents = (200 * torch.randn(2, 4, 8, 8)).requires_grad_()
    images = decode(vae, latents)
    assert images.shape == (2, 3, 32, 32)
    assert images.min() >= 0 and images.max() <= 1
    assert (saturated(images.detach()) > 0).all()
    (gradient,) = torch.autograd.grad(images.sum(), latents)
    assert gradient.abs().min() > 0


def test_total_is_the_weighted_sum_of_trained_rewards_and_the_sign_flips_once() -> None:
    scores = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([10.0, 20.0]), "held_out": torch.tensor([5.0, 5.0])}
    assert objective.total(scores, {"a": 2.0, "b": 0.1}).tolist() == pytest.approx([3.0, 6.0])
    assert objective.loss(scores["a"], 2.0).item() == pytest.approx(-3.0)


class Shard:
    """What `batches` uses of a Ray Data iterator: ordered blocks, again every epoch."""

    def __init__(self, num_rows: int, block: int) -> None:
        self.num_rows, self.block = num_rows, block

    def iter_batches(self, **_: object) -> Iterator[dict[str, np.ndarray]]:
        for start in range(0, self.num_rows, self.block):
            yield {"index": np.arange(start, min(start + self.block, self.num_rows))}


@settings(max_examples=60, deadline=None)
@given(
    num_rows=st.integers(1, 40),
    block=st.integers(1, 17),
    share=st.integers(1, 6),
    world_size=st.integers(1, 4),
    start_step=st.integers(0, 9),
)
def test_a_global_batch_is_fixed_by_its_step(
    num_rows: int, block: int, share: int, world_size: int, start_step: int
) -> None:
    batch_size = share * world_size
    workers = [
        batches(
            Shard(num_rows, block),  # type: ignore[arg-type]  # a stand-in for ray.data.DataIterator
            num_rows=num_rows,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            start_step=start_step,
        )
        for rank in range(world_size)
    ]
    for step in range(start_step, start_step + 4):
        slices = [next(worker) for worker in workers]
        positions = [position for rows in slices for position in rows.position]
        assert positions == list(range(step * batch_size, (step + 1) * batch_size))
        indices = [int(index) for rows in slices for index in rows.columns["index"]]
        assert indices == [position % num_rows for position in positions]


def test_rows_out_of_order_are_refused() -> None:
    class Shuffled(Shard):
        def iter_batches(self, **_: object) -> Iterator[dict[str, np.ndarray]]:
            yield {"index": np.array([0, 2, 1])}

    worker = batches(Shuffled(3, 3), num_rows=3, batch_size=1, rank=0, world_size=1, start_step=0)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="out of order"):
        next(worker)


def test_source_roots_are_no_packages() -> None:
    assert not list(ROOT.glob("*/__init__.py"))
    assert sorted(p.parent.name for p in (ROOT / "platform").glob("*/__init__.py")) == ["craftor", "craftor_micro"]
    assert [p.parent.name for p in (ROOT / "rewards").glob("*/__init__.py")] == ["craftor_rewards"]
    assert platform.__file__ is not None and "craftor" not in platform.__file__


IMPORTS = {
    "craftor.remote": ("torch", "ray", "numpy", "pydantic"),
    "craftor.recipe": ("torch", "ray", "mlflow", "diffusers", "craftor_rewards", "craftor_micro"),
    "craftor.cli": ("torch", "ray", "mlflow", "diffusers"),
    "craftor.denoise": ("ray", "mlflow", "craftor_rewards", "craftor_micro"),
    "craftor.tasks.reward_tuning": ("ray.train", "mlflow"),
}
"""What a module may not have brought, each imported after those above it in one process."""


def test_imports_run_one_way() -> None:
    program = (
        "import sys; from importlib import import_module\n"
        f"for module, forbidden in {IMPORTS!r}.items():\n"
        "    import_module(module); print(*(f'{module}: {name}' for name in forbidden if name in sys.modules), end='')"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout == ""


def test_rewards_are_a_library_of_their_own() -> None:
    sources = {path: path.read_text() for path in (ROOT / "rewards").rglob("*.py")}
    assert sources
    for path, text in sources.items():
        found = re.findall(r"^\s*(?:import|from) (craftor|craftor_micro|ray|mlflow|diffusers)\b", text, re.MULTILINE)
        assert not found, f"{path} imports {found}"
