"""Whole runs on Ray whose workers hold shards, and whose checkpoints are validated beside them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import write_tiny_recipe
from craftor import checkpoint, job, ledger, tracking, validation
from craftor.recipe import load
from craftor.run_files import METRICS, notes
from craftor.sharded_checkpoint import SHARDS

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]

PROMPTS = ("a small red star", "a large blue ring", "a large red star")
WHOLE = {"task.train": {"unet": {}}, "optimizer.cosine_from": 1.0, "run.checkpoint_every": 2, "register": None}


@pytest.fixture(scope="module")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    write_tiny_recipe(tiny, folder)
    (folder / "held_out.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return folder


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    last = checkpoint.latest(run_dir)
    assert last is not None
    return load_file(last / "unet" / "diffusion_pytorch_model.safetensors")


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return sum(float((one[name] - value).square().sum()) for name, value in other.items()) ** 0.5


def test_a_run_in_shards_goes_on_with_fewer_workers_and_is_validated(tiny: Path, folder: Path) -> None:
    """To the weights of one that was never sharded nor stopped; what validation found is in files and in MLflow."""
    recipe = folder / "tiny.toml"
    alone = job.train(load(recipe, {**WHOLE, "run.num_steps": 6}), recipe, folder / "runs" / "alone")
    changes = {
        **WHOLE,
        "workers.strategy": "fsdp",
        "validation": {"prompts": str(folder / "held_out.jsonl"), "num_prompts": 3, "num_cpus": 0.5},
    }
    out = folder / "runs" / "sharded"
    job.train(load(recipe, {**changes, "workers.num": 2, "run.num_steps": 4}), recipe, out)
    last = checkpoint.latest(out)
    assert last is not None and len(list((last / "trainer" / SHARDS).iterdir())) == 2
    assert [found["step"] for found in validation.read(out)] == [2, 4]
    assert not [said for said in notes(out) if "validated" in said]

    job.resume(out, load(recipe, {**changes, "workers.num": 1, "run.num_steps": 6}), accept=True)
    # AdamW divides each weight's gradient by its own size: where that is nearly nothing, rounding shows. So what counts
    # is the distance of all weights together, in that which they have come.
    before = load_file(tiny / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    assert distance(weights(out), weights(alone.run_dir)) < 1e-3 * distance(before, weights(alone.run_dir))
    assert ledger.audit(out).workers == [2, 1]
    lines = [[json.loads(line) for line in (run / METRICS).read_text().splitlines()] for run in (alone.run_dir, out)]
    for key in ("loss", "grad_norm", "drift"):
        assert [line[key] for line in lines[1]] == pytest.approx([line[key] for line in lines[0]], rel=1e-4)

    found = validation.read(out)
    assert [line["step"] for line in found] == [2, 4, 6]
    rows = [{"number": i, "index": i, "prompt": prompt, "description": None} for i, prompt in enumerate(PROMPTS)]
    last = checkpoint.latest(out)
    assert last is not None
    expected = validation.measure(load(out / "recipe.toml"), last, rows)
    assert found[-1]["metrics"].keys() == expected.keys() >= {"clip", "pick", "total"}
    for name, row in expected.items():
        assert found[-1]["metrics"][name] == pytest.approx(row, rel=1e-4, abs=1e-6)
    run_id = json.loads((out / "run.json").read_text())["mlflow_run_id"]
    history = tracking.client(out.parent).get_metric_history(run_id, "validation/total/tuned")
    assert {(point.step, point.value) for point in history} == {
        (line["step"], line["metrics"]["total"]["tuned"]) for line in found
    }
