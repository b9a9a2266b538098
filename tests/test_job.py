"""Whole runs on tiny models with real Ray and MLflow: worker counts, kills, resumes, refusals, registration."""

import json
from pathlib import Path

import mlflow
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPTextModel

from craftor import checkpoint, job, registry, tracking
from craftor.fit import METRICS
from craftor.recipe import load

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]


def run(recipe_file: Path, out: Path, **overrides: object) -> job.Trained:
    return job.train(load(recipe_file, {k.replace("__", "."): v for k, v in overrides.items()}), recipe_file, out)


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / METRICS).read_text().splitlines()]


def weights(out: Path) -> dict[str, torch.Tensor]:
    last = checkpoint.latest(out)
    assert last is not None
    return load_file(last / "trainer" / "module.safetensors")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def uninterrupted(runs: Path, tiny_recipe: Path) -> Path:
    """A run of 4 steps that nothing disturbed, made once."""
    out = runs / "uninterrupted"
    if not out.exists():
        run(tiny_recipe, out)
    return out


def test_run_leaves_metrics_checkpoints_and_a_registered_encoder(
    uninterrupted: Path, tiny: Path, tmp_path: Path
) -> None:
    records = lines(uninterrupted)
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    assert {"loss", "total", "clip", "pick", "grad_norm", "saturated", "drift", "images_per_second"} <= set(records[0])
    assert sorted(p.name for p in (uninterrupted / "checkpoints").iterdir()) == ["step-000002", "step-000004"]

    connected = tracking.client(uninterrupted.parent)
    version = connected.get_model_version_by_alias("tiny", "candidate")
    history = connected.get_metric_history(version.run_id, "total")
    assert [point.value for point in history] == pytest.approx([r["total"] for r in records])
    inputs = connected.get_run(version.run_id).inputs.dataset_inputs
    assert inputs[0].dataset.digest == json.loads((uninterrupted / "run.json").read_text())["digest"][:16]

    mlflow.set_tracking_uri(f"sqlite:///{uninterrupted.parent / 'mlflow.db'}")
    bundle = registry.fetch("models:/tiny@candidate", tmp_path / "bundle")
    encoder = CLIPTextModel.from_pretrained(bundle / "text_encoder", use_safetensors=True)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny / "pipeline", text_encoder=encoder, safety_checker=None)
    assert pipeline("a red star", num_inference_steps=2, output_type="np").images.shape == (1, 32, 32, 3)
    trained = weights(uninterrupted)
    assert all(torch.equal(value, trained[name]) for name, value in pipeline.text_encoder.state_dict().items())


def test_a_changed_bundle_is_refused(uninterrupted: Path, tmp_path: Path) -> None:
    import shutil

    bundle = tmp_path / "bundle"
    shutil.copytree(uninterrupted / "bundle", bundle)
    registry.verify_bundle(bundle)
    (bundle / "encoder.toml").write_text("name = 'other'\n")
    with pytest.raises(ValueError, match=r"encoder\.toml: missing or changed"):
        registry.verify_bundle(bundle)
    (bundle / "text_encoder" / "code.py").write_text("")
    with pytest.raises(ValueError, match=r"code\.py: not a file of an encoder bundle"):
        registry.verify_bundle(bundle)


@pytest.mark.parametrize("num_workers", [2, 4])
def test_any_number_of_workers_gives_the_same_losses(
    uninterrupted: Path, runs: Path, tiny_recipe: Path, num_workers: int
) -> None:
    out = runs / f"workers-{num_workers}"
    run(tiny_recipe, out, workers__num=num_workers)
    for ours, alone in zip(lines(out), lines(uninterrupted), strict=True):
        for name in ("loss", "total", "clip", "pick", "grad_norm"):
            assert ours[name] == pytest.approx(alone[name], rel=1e-5, abs=1e-5), (ours["step"], name)
