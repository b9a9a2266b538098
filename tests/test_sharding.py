"""Four workers that hold shards make what one that holds everything makes, and go on from each other's checkpoints."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from conftest import write_tiny_recipe
from craftor import checkpoint, trainable
from craftor.diffuser import load as load_diffuser
from craftor.recipe import RecipeError, load
from craftor.sharded_checkpoint import MOMENTS, SHARDS
from sharded_workers import BATCH, CASES, Worker, member, recipes, shard_bytes, together


@pytest.fixture(scope="module")
def ran(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what four workers made, `whole/` with a whole model's checkpoint, and `tiny.toml`."""
    folder = tmp_path_factory.mktemp("sharding")
    recipe = write_tiny_recipe(tiny, folder)
    alone = Worker(recipe, {**recipes(tiny)["both"], "workers.strategy": "ddp"})
    alone.train(range(1))
    alone.save(folder / "whole", 1)
    together(4, member, str(folder), str(recipe), str(tiny))
    return folder


def whole(ran: Path, tiny: Path, name: str) -> Worker:
    return Worker(ran / "tiny.toml", {**recipes(tiny)[name], "workers.strategy": "ddp"})


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Every number to 1e-5; moments, which are the gradients' and as small, relative to their size."""
    assert found.keys() - {"held"} == expected.keys() - {"held"}
    for name in expected.keys() - {"held"}:
        torch.testing.assert_close(
            found[name], expected[name], rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    for moment in MOMENTS:
        names = sorted(name for name in expected if name.endswith(moment))
        there, here = (torch.cat([figures[name].flatten() for name in names]) for figures in (found, expected))
        assert (there - here).norm() < 1e-5 * here.norm()


@pytest.mark.parametrize("name", CASES)
def test_four_workers_make_what_one_makes(ran: Path, tiny: Path, name: str) -> None:
    alone = whole(ran, tiny, name)
    alone.train(range(2))
    found = load_file(ran / f"{name}.safetensors")
    assert_close(found, alone.figures())
    # A worker holds a quarter, and what does not divide.
    everything = (shard_bytes(alone.task.module), shard_bytes(alone.task.diffuser.unet))
    assert all(part < 0.3 * total for part, total in zip(found["held"].tolist(), everything, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_one_worker_goes_on_where_four_stopped(ran: Path, tiny: Path, name: str) -> None:
    alone = whole(ran, tiny, name)
    folder = checkpoint.latest(ran / name)
    assert folder is not None and len(list((folder / "trainer" / SHARDS).iterdir())) == 4
    alone.restore(folder)
    alone.train(range(1, 2))
    found, expected = load_file(ran / f"{name}.safetensors"), alone.figures()
    assert_close({**found, "norms": found["norms"][1:]}, expected)


def test_four_workers_go_on_where_one_stopped(ran: Path) -> None:
    found, expected = load_file(ran / "from_whole.safetensors"), load_file(ran / "both.safetensors")
    assert_close(found, {**expected, "norms": expected["norms"][1:]})


@pytest.mark.parametrize("name", CASES)
def test_shards_consolidate_to_folders_that_load(ran: Path, tiny: Path, name: str) -> None:
    """With the averaged weights, as those of an unsharded run."""
    alone = whole(ran, tiny, name)
    alone.train(range(1))
    alone.save(ran / f"{name}-alone", 1)
    folders = [checkpoint.latest(ran / run) for run in (name, f"{name}-alone")]
    assert folders[0] is not None and folders[1] is not None
    sharded, plain = (trainable.load(load_diffuser(alone.recipe.model), folder) for folder in folders if folder)
    assert sharded.keys() == plain.keys()
    for part in plain:
        for key, value in plain[part].state_dict().items():
            torch.testing.assert_close(sharded[part].state_dict()[key], value, rtol=1e-5, atol=1e-5)
    configs = [
        sorted(path.relative_to(f) for path in f.rglob("*.json") if path.parent != f and path.parent.name != "trainer")
        for f in folders
        if f
    ]
    assert configs[0] == configs[1]
    for config in configs[0]:
        assert (folders[0] / config).read_text() == (folders[1] / config).read_text()


def test_shards_of_nodes_without_a_common_folder_meet_at_the_url(ran: Path) -> None:
    """What is there is what a common folder has; nodes keep nothing of it."""
    there, here = (ran / run / "checkpoints" / "step-000001" for run in ("away", "both"))
    checkpoint.verify(there)
    assert checkpoint.digests(there).keys() == checkpoint.digests(here).keys()
    for path in (path.relative_to(here) for path in here.rglob("*.safetensors")):
        found, expected = load_file(there / path), load_file(here / path)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not any((ran / f"node-{rank}" / "checkpoints" / ".writing-step-000001").exists() for rank in range(4))


def test_shards_are_safetensors_alone(ran: Path) -> None:
    folder = ran / "both" / "checkpoints" / "step-000001"
    checkpoint.verify(folder)
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".json", ".jsonl", ".safetensors"}
    for path in (folder / "trainer" / SHARDS).iterdir():
        with safe_open(path, framework="pt") as file:
            assert file.keys()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"workers.num": 0}, "workers.num = 0; allowed: 1 or more"),
        ({"task.train": {"text_encoder": {}}}, "only text_encoder trains"),
        ({"model.compile": True}, "model.compile = true; allowed: false"),
        ({"model.channels_last": True}, "model.channels_last = true; allowed: false"),
        ({"task.window": {"random_last": [1, 2]}}, r"task.window.random_last draws"),
        ({"task.window": {"last": 2, "recompute": "auto", "memory_limit_gib": 1.0}}, "measured by each worker"),
        ({"workers.num": [2, 3], "run.micro_batch": 2}, "3 workers have 2 or 3 of run.batch_size = 8"),
        (
            {"task.kind": "policy_gradient", "task.window": {"last": 2}, "task.updates_per_rollout": 2},
            "updates_per_rollout = 2 keeps a whole copy",
        ),
        (
            {"task.kind": "reward_weighted", "task.window": {"last": 2}, "task.temperature": 1.0},
            "makes the images that a worker lacks",
        ),
    ],
    ids=str,
)
def test_what_cannot_train_in_shards_is_refused(tiny_recipe: Path, changes: dict, expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        load(tiny_recipe, {**BATCH, "task.train.unet.method": "full", **changes})
