"""The registry from the command line: lineage and scores in, versions compared, exported, merged and promoted."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPTextModel
from typer.testing import CliRunner

import craftor
import guarded_mlflow
from craftor import checkpoint, encoders, tracking
from craftor.cli import app
from craftor.diffuser import load
from craftor.encoders import EncoderRefused, load_encoder, resolve
from craftor.mixture import MixtureError
from craftor.recipe import Recipe, RecipeError
from craftor.registry import BundleError
from encoder_bundles import empty_store, make_bundle, make_run, new_store, recipe_for, register


@pytest.fixture
def recipe(tiny_recipe: Path) -> Recipe:
    return recipe_for(tiny_recipe)


@pytest.fixture
def runs(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store with two encoders of one base: a/1 (candidate) and b/1."""
    monkeypatch.setenv("CRAFTOR_CACHE", str(tmp_path / "cache"))
    connected = new_store(tmp_path / "runs")
    for name, seed, aliases in (("a", 1, ["candidate"]), ("b", 2, [])):
        register(connected, make_bundle(recipe, tmp_path / name, seed), name, *aliases)
    return tmp_path / "runs"


def craft(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def cell(table: str, row: str) -> str:
    """The second column of a row."""
    (line,) = [line for line in table.splitlines() if re.split(r"\s*[│┃]\s*", line)[1:2] == [row]]
    return re.split(r"\s*[│┃]\s*", line)[2].strip()


def test_a_run_from_elsewhere_brings_its_lineage_and_scores(recipe: Recipe, runs: Path, tmp_path: Path) -> None:
    """A store that has never seen the run: its metrics, dataset and held-out scores are there after `register`."""
    run = make_run(recipe, tmp_path / "elsewhere", seed=3)
    assert craft("register", run, "--alias", "candidate", "--runs", runs).strip() == "models:/tiny/1"
    connected = tracking.client(runs)
    found = resolve(connected, "tiny@candidate")
    entered = connected.get_run(found.run_id)
    assert entered.data.tags["craftor.original_run"] == "f" * 32 and entered.info.status == "FINISHED"
    assert [point.value for point in connected.get_metric_history(found.run_id, "loss")] == [-0.5, -1.0, -1.5, -2.0]
    assert entered.data.metrics["held_out/quality/delta"] == 0.5
    assert entered.data.params["task.rewards.clip.weight"] == "10.0"
    digest = json.loads((run / "run.json").read_text())["digest"]
    assert entered.inputs.dataset_inputs[0].dataset.digest == digest[:16]

    listed = craft("list", "--runs", runs)
    assert re.search(r"tiny/1 .* candidate .* 499\.\.0 .* quality \+0\.5 .* tiny ", listed)
    assert re.search(r"a/1 .* not evaluated", listed) and "accuracy" not in listed  # its interval has zero in it
    shown = craft("show", "tiny", "--runs", runs)
    assert cell(shown, "MLflow run") == found.run_id and cell(shown, "dataset sha256") == digest
    assert cell(shown, "weights sha256") == found.tags["craftor.sha256"]
    assert cell(shown, "rewards") == "clip (clip_score) x 10, pick (pick_score) x 0.5"
    assert re.search(r"quality +7\.00 +7\.50 +\+0\.50 \[\+0\.40, \+0\.60\] ↑ +90% +held out", shown)

    craft("register", run, "--name", "again", "--runs", runs)
    compared = craft("diff", "a", "again", "--runs", runs, "--steps", 2, "--out", tmp_path / "grid.png")
    assert "models:/again/1 on held-out prompts" in compared and "models:/a/1 on held-out" not in compared
    assert re.search(r"quality +7\.00 +7\.50 +\+0\.50", compared)
    other = resolve(connected, "again")
    assert other.tags["craftor.sha256"] == found.tags["craftor.sha256"] and other.scores == found.scores


def test_promotion_moves_an_alias(runs: Path) -> None:
    connected = tracking.client(runs)
    assert craft("promote", "a@candidate", "--runs", runs).strip() == "a@champion is a/1"
    shutil.copytree(encoders.fetch(resolve(connected, "a/1")), runs.parent / "copy")
    assert craft("register", runs.parent / "copy", "--name", "a", "--runs", runs).strip() == "models:/a/2"
    assert craft("promote", "a/2", "--alias", "champion", "--runs", runs).strip() == "a@champion is a/2 (was a/1)"
    assert resolve(connected, "a@champion").version == "2"
    copy = ("register", runs.parent / "copy", "--name", "a", "--runs", runs)
    assert craft(*copy, "--tag", "owner=ann", "--tag", "for=print").strip() == "models:/a/3"
    assert craft("promote", "a@champion", "--runs", runs).strip() == "a@champion is a/3 (was a/2)"
    assert "owner=ann, for=print" in craft("list", "--runs", runs)
    assert cell(craft("show", "a", "--runs", runs), "tag owner") == "ann"
    for tag in ("owner", "=ann", "craftor.sha256=0"):
        with pytest.raises(RecipeError, match="expected KEY=VALUE"):
            craft(*copy, "--tag", tag)
    with pytest.raises(BundleError, match="'a@b': a name has letters, digits"):
        craft("register", runs.parent / "copy", "--name", "a@b", "--runs", runs)
    with pytest.raises(encoders.UnknownEncoder, match="of a there are: @champion, @candidate, /3, /2, /1"):
        craft("promote", "a/7", "--runs", runs)


def test_diff_shows_what_differs(recipe: Recipe, runs: Path, tmp_path: Path) -> None:
    grid = tmp_path / "grid.png"
    common = ("--out", grid, "--prompt", "a red star", "--prompt", "a blue ring", "--steps", 4, "--runs", runs)
    told = craft("diff", "a", "b", *common)
    distances = [float(number) for number in re.findall(r"layer 1 .*", told)[0].split("│")[1:4]]
    base = load(recipe.model)
    one, other = (load_encoder(resolve(tracking.client(runs), name), base).module for name in "ab")
    weights = [
        torch.cat([p.flatten() for p in module.encoder.layers[1].parameters()])
        for module in (one, other, base.text_encoder)
    ]
    expected = [(weights[i] - weights[j]).norm() / weights[j].norm() for i, j in ((0, 2), (1, 2), (0, 1))]
    assert distances == pytest.approx([value.item() for value in expected], rel=1e-2)
    picture = Image.open(grid)
    assert picture.size == (3 * 32, 2 * 32)
    tiles = [picture.crop((32 * i, 0, 32 * i + 32, 32)).tobytes() for i in range(3)]
    assert len(set(tiles)) == 3
    shown = craft("show", "b", "--grid", tmp_path / "b.png", *common[2:])
    assert "columns: base, models:/b/1; seed 0" in shown.replace("\n", " ")
    beside = Image.open(tmp_path / "b.png")
    assert beside.size == (2 * 32, 2 * 32)
    assert [beside.crop((32 * i, 0, 32 * i + 32, 32)).tobytes() for i in range(2)] == [tiles[0], tiles[2]]
    craft("diff", "a", "a", *common)
    picture = Image.open(grid)
    assert picture.crop((32, 0, 64, 64)).tobytes() == picture.crop((64, 0, 96, 64)).tobytes()


def test_exports_load_elsewhere(recipe: Recipe, runs: Path, tmp_path: Path, tiny: Path) -> None:
    """diffusers: into a stock pipeline. ComfyUI: CLIP's published names, and the same tensors under them."""
    encoder = load_encoder(resolve(tracking.client(runs), "a"), load(recipe.model))
    wanted = encoder.module.state_dict()
    craft("export", "a@candidate", "--to", "diffusers", "--out", tmp_path / "diffusers", "--runs", runs)
    again = CLIPTextModel.from_pretrained(tmp_path / "diffusers" / "text_encoder", use_safetensors=True)
    assert all(torch.equal(value, wanted[name]) for name, value in again.state_dict().items())
    card = (tmp_path / "diffusers" / "README.md").read_text()
    assert encoder.sha256 in card and "timesteps 499 to 0" in card and "clip_score, weight 10" in card
    pipe = StableDiffusionPipeline.from_pretrained(tiny / "pipeline", safety_checker=None)
    with craftor.apply(pipe, {tmp_path / "diffusers": {"weight": 1.0, "from": 499, "to": 0}}) as applied:
        assert applied.members[0].encoder.part == "text_encoder"

    craft("export", "a", "--to", "comfyui", "--out", tmp_path / "comfyui", "--runs", runs)
    file = tmp_path / "comfyui" / "a-1.safetensors"
    names = load_file(file)
    assert {"text_model.encoder.layers.0.mlp.fc1.weight", "text_model.embeddings.token_embedding.weight"} <= set(names)
    assert {name.removeprefix("text_model."): tuple(value.shape) for name, value in names.items()} == {
        name: tuple(value.shape) for name, value in wanted.items()
    }
    assert all(torch.equal(value, wanted[name.removeprefix("text_model.")]) for name, value in names.items())
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["sha256"] == encoder.sha256
    with pytest.raises(RecipeError, match="exists and is not an empty folder"):
        craft("export", "a", "--to", "comfyui", "--out", tmp_path / "comfyui", "--runs", runs)
    with pytest.raises(RecipeError, match="--to onnx: allowed are diffusers, comfyui"):
        craft("export", "a", "--to", "onnx", "--out", tmp_path / "x", "--runs", runs)


def test_a_pipeline_takes_registered_names(runs: Path, tiny: Path) -> None:
    """In the timesteps an encoder was trained for, unless told otherwise; the version is known to whoever asks."""
    pipe = StableDiffusionPipeline.from_pretrained(tiny / "pipeline", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)

    def picture() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipe("a red star", num_inference_steps=4, generator=generator, output_type="pt").images

    plain = picture()
    with craftor.apply(pipe, {"a@candidate": 0.5, "b/1": 0.25}, runs=runs) as applied:
        named = picture()
    assert [(m.encoder.uri, m.window) for m in applied.members] == [
        ("models:/a/1", (499, 0)),
        ("models:/b/1", (499, 0)),
    ]
    bundles = {
        runs.parent / "b" / "bundle": {"weight": 0.25, "from": 499, "to": 0},
        str(runs.parent / "a" / "bundle"): {"weight": 0.5, "from": 499, "to": 0},
    }
    with craftor.apply(pipe, bundles):
        torch.testing.assert_close(picture(), named)
    assert not torch.equal(named, plain)
    with pytest.raises(encoders.UnknownEncoder, match="no encoder 'c' in the registry; there are: a, b"):
        craftor.apply(pipe, {"c": 1.0}, runs=runs)


def test_merging_sums_weights_and_can_be_registered(recipe: Recipe, runs: Path, tmp_path: Path) -> None:
    told = craft("merge", "a@candidate=0.25", "b=0.5", "--name", "c", "--out", tmp_path / "c", "--runs", runs)
    assert f"craftor register {tmp_path / 'c'}" in told.replace("\n", "")
    craft("register", tmp_path / "c", "--alias", "champion", "--runs", runs)
    base, connected = load(recipe.model), tracking.client(runs)
    states = [load_encoder(resolve(connected, name), base).module.state_dict() for name in ("a", "b", "c@champion")]
    for name, value in base.text_encoder.state_dict().items():
        a, b, merged = (state[name] for state in states)
        torch.testing.assert_close(merged, 0.25 * a + 0.5 * b + 0.25 * value)
    shown = craft("show", "c", "--runs", runs)
    assert cell(shown, "merged from") == "models:/a/1 x 0.25, models:/b/1 x 0.5"
    assert cell(shown, "timesteps") == "499..0"
    for members, error, message in (
        (["a=0.8", "b=0.8"], MixtureError, "sum to 1.6, allowed: up to 1"),
        (["a"], RecipeError, "expected ENCODER=WEIGHT"),
        (["a=nan"], MixtureError, "weight is nan, allowed: 0 to 1"),
    ):
        with pytest.raises(error, match=message):
            craft("merge", *members, "--name", "d", "--out", tmp_path / "d", "--runs", runs)


def test_a_base_that_is_not_here_can_be_named(recipe: Recipe, runs: Path, tmp_path: Path, tiny: Path) -> None:
    moved = recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": str(tiny / "pipeline")})})
    bundle = make_bundle(moved, tmp_path / "moved", 4)
    text = (bundle / "encoder.toml").read_text()
    (bundle / "encoder.toml").write_text(text.replace(str(tiny / "pipeline"), "/gone/pipeline"))
    (bundle / "manifest.json").write_text(json.dumps(checkpoint.digests(bundle)))
    export = ("export", bundle, "--to", "comfyui", "--runs", runs)
    with pytest.raises(RecipeError, match=r"(?s)is not here: .*/gone/pipeline.*or say where with --base"):
        craft(*export, "--out", tmp_path / "x")
    assert "tiny.safetensors" in craft(*export, "--out", tmp_path / "x", "--base", tiny / "pipeline")
    with pytest.raises(EncoderRefused, match="has hidden_act"):
        craft(*export, "--out", tmp_path / "y", "--base", tiny / "sd2")


@pytest.fixture
def guarded_server(tmp_path: Path) -> Iterator[str]:
    pytest.importorskip("flask_wtf", reason="mlflow[auth] is not installed")
    store = tmp_path / "server"
    store.mkdir()
    (store / "mlflow.db").write_bytes(empty_store())
    script = Path(__file__).with_name("guarded_mlflow.py")
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", script, store], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert server.stdout is not None
    yield f"http://127.0.0.1:{server.stdout.readline().strip()}"
    server.terminate()
    server.wait(30)


def test_a_server_with_authentication(
    guarded_server: str, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's own: who trains registers and promotes, who serves may only read, and nobody else gets in."""
    monkeypatch.setenv("CRAFTOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", guarded_server)

    def log_in(name: str, password: str) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", name)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)

    log_in(guarded_mlflow.TRAINER[0], "wrong")
    with pytest.raises(tracking.TrackingUnreachable, match="401"):
        craft("list")
    log_in(*guarded_mlflow.TRAINER)
    run = make_run(recipe, tmp_path / "run", seed=1)
    assert craft("register", run, "--alias", "candidate").strip() == "models:/tiny/1"
    assert craft("promote", "tiny@candidate").strip() == "tiny@champion is tiny/1"
    assert list((tmp_path / "server" / "artifacts").rglob("model.safetensors"))  # they went through the server

    log_in(*guarded_mlflow.READER)
    shutil.rmtree(tmp_path / "cache")
    assert "quality +0.5" in craft("list")
    found = resolve(tracking.client(tmp_path), "tiny@champion")
    assert load_encoder(found, load(recipe.model)).window == (499, 0)
    for forbidden in (("promote", "tiny", "--alias", "mine"), ("register", run)):
        with pytest.raises(tracking.TrackingUnreachable, match="(?i)permission"):
            craft(*forbidden)
    assert os.environ["MLFLOW_TRACKING_URI"] == guarded_server
