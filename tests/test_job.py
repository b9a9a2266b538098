"""Whole runs on tiny models with real Ray and MLflow: worker counts, kills, resumes, refusals, registration."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from diffusers import StableDiffusionPipeline
from mlflow.exceptions import MlflowException
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from craftor import checkpoint, job, ledger, registry, tracking
from craftor.cluster import ray_session
from craftor.fit import TrainingStopped
from craftor.precision import NAMES
from craftor.recipe import RecipeError, load
from craftor.run_files import METRICS, notes
from waiting import wait_for
from watched_runs import processes

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]


def run(recipe_file: Path, out: Path, **overrides: object) -> job.Trained:
    return job.train(load(recipe_file, {k.replace("__", "."): v for k, v in overrides.items()}), recipe_file, out)


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / METRICS).read_text().splitlines()]


def weights(out: Path) -> dict[str, torch.Tensor]:
    last = checkpoint.latest(out)
    assert last is not None
    return load_file(last / "trainer" / "module.safetensors")


def test_settings_for_a_cluster_end_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", raising=False)
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "7")
    before = dict(os.environ)
    with pytest.raises(KeyError), ray_session(1):
        assert os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] == "5"
        assert os.environ["RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"] == "7", "whoever has set one keeps it"
        raise KeyError
    assert dict(os.environ) == before


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def uninterrupted(runs: Path, tiny_recipe: Path) -> Path:
    """A run of 24 steps that nothing disturbed, made once."""
    out = runs / "uninterrupted"
    if not out.exists():
        run(tiny_recipe, out)
    return out


def test_run_leaves_metrics_checkpoints_and_a_registered_encoder(
    uninterrupted: Path, tiny: Path, tmp_path: Path
) -> None:
    records = lines(uninterrupted)
    assert [r["step"] for r in records] == list(range(1, 25))
    assert {"loss", "total", "clip", "pick", "grad_norm", "saturated", "drift", "images_per_second"} <= set(records[0])
    assert sorted(p.name for p in (uninterrupted / "checkpoints").iterdir()) == [
        f"step-{step:06d}" for step in range(4, 25, 4)
    ]
    assert sorted(p.name for p in (uninterrupted / "samples").iterdir())[0] == "step-000004.png"

    connected = tracking.client(uninterrupted.parent)
    version = connected.get_model_version_by_alias("tiny", "candidate")
    history = connected.get_metric_history(version.run_id, "total")
    assert [point.value for point in history] == pytest.approx([r["total"] for r in records])
    inputs = connected.get_run(version.run_id).inputs.dataset_inputs
    assert inputs[0].dataset.digest == json.loads((uninterrupted / "run.json").read_text())["digest"][:16]

    bundle = registry.fetch("models:/tiny@candidate", tmp_path / "bundle")
    encoder = CLIPTextModel.from_pretrained(bundle / "text_encoder", use_safetensors=True)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny / "pipeline", text_encoder=encoder, safety_checker=None)
    assert pipeline("a red star", num_inference_steps=2, output_type="np").images.shape == (1, 32, 32, 3)
    trained = weights(uninterrupted)
    assert all(
        torch.equal(value, trained[f"text_encoder.{name}"])
        for name, value in pipeline.text_encoder.state_dict().items()
    )


def test_a_changed_bundle_is_refused(uninterrupted: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(uninterrupted / "bundle", bundle)
    registry.verify_bundle(bundle)
    (bundle / "encoder.toml").write_text("name = 'other'\n")
    with pytest.raises(ValueError, match=r"encoder\.toml: missing or changed"):
        registry.verify_bundle(bundle)
    shutil.copyfile(uninterrupted / "bundle" / "encoder.toml", bundle / "encoder.toml")
    (bundle / "text_encoder" / "code.py").write_text("")
    with pytest.raises(ValueError, match=r"code\.py: not a file of an encoder bundle"):
        registry.verify_bundle(bundle)


def test_four_workers_give_the_losses_of_one(uninterrupted: Path, runs: Path, tiny_recipe: Path) -> None:
    out = runs / "four-workers"
    run(tiny_recipe, out, workers__num=4, run__num_steps=4, optimizer__cosine_from=1.0)
    assert len(lines(out)) == 4
    assert ledger.audit(out) == ledger.Audit(4, 16, epochs=2, remainder=0, num_rows=8, workers=[4])
    for ours, alone in zip(lines(out), lines(uninterrupted), strict=False):
        for name in ("loss", "total", "clip", "pick", "grad_norm"):
            assert ours[name] == pytest.approx(alone[name], rel=1e-5, abs=1e-5), (ours["step"], name)


def test_a_run_killed_whole_and_then_in_its_worker_ends_with_the_same_bits(
    uninterrupted: Path, runs: Path, tiny_recipe: Path
) -> None:
    """`kill -9` of driver, Ray and worker after step 4; resumed, of the worker alone after step 12.

    A training worker is another process than the one that made the undisturbed run: that changes no bit either.
    """
    out = runs / "killed"
    program = (
        "import sys; from pathlib import Path; from craftor import job, recipe; path = Path(sys.argv[1]);"
        "job.train(recipe.load(path, {'workers.num': 1}), path, Path(sys.argv[2]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tiny_recipe), str(out)],
        start_new_session=True,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
    )
    wait_for(lambda: (out / "checkpoints" / "step-000004").exists(), process)
    kill_tree(process)
    assert len(lines_written(out)) < 12, "it had come too far when it was killed"

    killed: list[int] = []

    def kill_worker() -> None:
        while not (out / "checkpoints" / "step-000012").exists():
            time.sleep(0.02)
        for worker in processes("RayTrainWorker"):
            worker.kill()
            killed.append(worker.pid)

    thread = threading.Thread(target=kill_worker, daemon=True)
    thread.start()
    job.resume(out)  # Ray Train starts another worker, which goes on from the last checkpoint
    thread.join(timeout=5)
    assert killed
    assert_same_run(out, uninterrupted)


def test_a_reward_that_is_not_finite_stops_the_run(runs: Path, tiny: Path, tiny_recipe: Path, tmp_path: Path) -> None:
    """The CLIP's token embedding of one word is NaN: the sample whose prompt has it is named."""
    broken = tmp_path / "broken"
    shutil.copytree(tiny / "clip", broken)
    tensors = load_file(broken / "model.safetensors")
    name = next(name for name in tensors if name.endswith("token_embedding.weight"))
    tokenizer = CLIPTokenizer.from_pretrained(broken)
    tensors[name][tokenizer("ring").input_ids[1]] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    out = runs / "nan"
    with pytest.raises(TrainingStopped, match=r"clip is nan for sample \d+ \(seed 7\), prompt 'a .* ring'"):
        run(tiny_recipe, out, task__rewards__clip__weights=str(broken))
    assert not (out / "checkpoints").exists() or checkpoint.latest(out) is None


@pytest.mark.parametrize(("precision", "times"), [("bf16", 1), ("auto", 0)])
def test_a_run_says_that_its_precision_is_emulated(
    runs: Path, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch, precision: str, times: int
) -> None:
    """On a processor that has no kernels for bf16: asked for, it is used; left to us, it is not."""
    for module in ("craftor.worker", "craftor.precision"):
        monkeypatch.setattr(f"{module}.multiplies_bf16", lambda device: False)
    out = runs / f"in-{precision}"
    run(tiny_recipe, out, run__num_steps=1, model__precision=precision, register=None)
    assert [said.startswith('model.precision = "bf16" is emulated') for said in notes(out)] == [True] * times


def test_workers_that_compute_differently_are_refused(
    runs: Path, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if worker 0, whose choice each compares with its own, had bf16 and this one had not."""
    monkeypatch.setattr("craftor.worker.first_says", lambda number, world_size: list(NAMES).index(torch.bfloat16))
    with pytest.raises(TrainingStopped, match=r"computes in fp32, worker 0's in bf16.*\nThe last checkpoint stands"):
        run(tiny_recipe, runs / "differing", run__num_steps=1, register=None)


def test_the_folder_of_another_run_is_refused(uninterrupted: Path, tiny_recipe: Path) -> None:
    with pytest.raises(RecipeError, match=r"holds another run; choose a new one with --out, or .* --resume"):
        run(tiny_recipe, uninterrupted)


def test_another_recipe_is_shown_and_refused_unless_accepted(uninterrupted: Path, tiny_recipe: Path) -> None:
    other = load(tiny_recipe, {"optimizer.lr": 2e-3, "run.checkpoint_every": 5})
    with pytest.raises(RecipeError, match=r"checkpoint_every: there 4, here 5.*--accept") as refused:
        job.resume(uninterrupted, other)
    assert "optimizer.lr: there 0.001, here 0.002" in str(refused.value) and "seed" not in str(refused.value)


def test_a_run_goes_on_where_mlflow_does_not_know_it(
    uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As one does whose home is a bucket, on another machine with its own MLflow."""
    copy = tmp_path / "runs" / "copy"
    shutil.copytree(uninterrupted, copy)
    began = json.loads((copy / "run.json").read_text())["mlflow_run_id"]
    with pytest.raises(RecipeError, match="does not know this run; set MLFLOW_TRACKING_URI"):
        job.sync(copy)
    assert job.resume(copy).registered is not None
    assert "does not know this run: it gets a new one there" in capsys.readouterr().out
    state = json.loads((copy / "run.json").read_text())
    history = tracking.client(copy.parent).get_metric_history(state["mlflow_run_id"], "loss")
    assert state["mlflow_run_id"] != began and sorted(point.step for point in history) == [*range(1, 25)]
    assert job.resume(copy).registered == state["registered"], "known now"


def test_metrics_are_sent_of_a_run_that_is_to_go_on(uninterrupted: Path, tmp_path: Path) -> None:
    """Registered before its end, its encoder would never be again."""
    copy = uninterrupted.parent / "copy-to-sync"
    shutil.copytree(uninterrupted, copy)
    recipe, state = (copy / "recipe.toml").read_text(), json.loads((copy / "run.json").read_text())
    (copy / "recipe.toml").write_text(recipe.replace("num_steps = 24", "num_steps = 48"))
    (copy / "run.json").write_text(json.dumps({key: state[key] for key in state if key != "registered"}))
    assert job.sync(copy).registered is None and "registered" not in json.loads((copy / "run.json").read_text())
    (copy / "recipe.toml").write_text(recipe)
    assert job.sync(copy).registered is not None


@pytest.mark.usefixtures("cluster")
def test_what_ended_a_run_is_heard_while_mlflow_is_away(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object, **__: object) -> None:
        raise MlflowException("no answer")

    def stopped(*_: object) -> None:
        monkeypatch.setattr(tracking.Tracker, "finish", away)
        raise TrainingStopped("a guard stopped the run")

    monkeypatch.setattr(job, "fit", stopped)
    with pytest.raises(TrainingStopped, match="a guard stopped the run"):
        run(tiny_recipe, tmp_path / "run")


def test_rows_that_changed_since_are_refused(uninterrupted: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(uninterrupted, copy)
    state = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps({**state, "digest": "0" * 64}))
    with pytest.raises(RecipeError, match="put the original rows back"):
        job.resume(copy)


def assert_same_run(ours: Path, expected: Path) -> None:
    """The same weights bit for bit, and the same loss at every step."""
    found, wanted = weights(ours), weights(expected)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert [r["loss"] for r in lines(ours)] == [r["loss"] for r in lines(expected)]
    assert ledger.audit(ours) == ledger.audit(expected)


def lines_written(out: Path) -> list[str]:
    return (out / METRICS).read_text().splitlines()


def kill_tree(process: subprocess.Popen) -> None:
    """SIGKILL to the driver and everything it started; Ray's daemons may have sessions of their own."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
