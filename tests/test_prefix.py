"""The prefix is data: computed in the worker, streamed by actors or read from a cache, it is the same bits."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import write_tiny_recipe
from craftor import job, prefix_cache, storage
from craftor.inputs import fill_prefix_cache, prepare, prepared_earlier
from craftor.prefix import LATENTS, PrefixActor
from craftor.prompts import describe
from craftor.recipe import Recipe, RecipeError, load
from craftor.stage import ReadShare, opened
from craftor.stream import Rows
from craftor.tasks.reward_tuning import RewardTuningTask

pytestmark = pytest.mark.ray
QUICK = {"run.num_steps": 3, "run.checkpoint_every": 3, "register": None}


def recipe(path: Path, **overrides) -> Recipe:
    return load(path, {**QUICK, **{key.replace("__", "."): value for key, value in overrides.items()}})


@pytest.fixture(scope="module")
def cache(tiny: Path, tmp_path_factory: pytest.TempPathFactory, cluster: None) -> Path:
    """A cache of the tiny recipe's prefixes up to denoising step 2."""
    folder = tmp_path_factory.mktemp("prefix")
    path = write_tiny_recipe(tiny, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_cache, "SAMPLES_PER_PART", 4)
        assert fill_prefix_cache(recipe(path), path, str(folder / "cache"), num_actors=1) == 12
    return folder / "cache"


@pytest.fixture(scope="module")
def prepared(tiny: Path, tmp_path_factory: pytest.TempPathFactory, cluster: None) -> Path:
    """The folder of a run that has its rows."""
    folder = tmp_path_factory.mktemp("run")
    prepare(recipe(write_tiny_recipe(tiny, folder)), folder)
    return folder


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "checkpoints" / "step-000003" / "text_encoder" / "model.safetensors")


@pytest.mark.parametrize("solver", ["ddim", "dpm_solver_2m"])
def test_rows_with_a_prefix_give_the_step_without(tiny_recipe: Path, solver: str) -> None:
    settings = recipe(tiny_recipe, task__rollout={"num_steps": 6, "guidance_scale": 3.0, "solver": solver})
    task = RewardTuningTask(settings)
    prompts = ["a small red star", "a large blue ring", "a large red ring", "a small blue ring"]
    ids = task.diffuser.tokenize(prompts)["text_encoder"].numpy()
    columns = {"input_ids": ids, "prompt": np.array(prompts, dtype=object)}
    without = task.step(Rows([4, 5, 6, 7], columns))
    staged = PrefixActor(settings.model_dump(by_alias=True))({**columns, "position": np.arange(4, 8)})
    task.module.zero_grad()
    staged.pop("position")
    found = task.step(Rows([4, 5, 6, 7], staged))
    assert ("prefix_x0" in staged) == (solver != "ddim")
    for name, values in without.items():
        assert torch.equal(values, found[name]), name


def test_worker_stage_and_cache_train_the_same_bits(tiny_recipe: Path, tmp_path: Path, cache: Path) -> None:
    found = {}
    for mode, prefix in {
        "worker": {},
        "stage": {"mode": "stage"},
        "cache": {"mode": "cache", "cache": str(cache)},
    }.items():
        # A worker of its own starts the actors of its stage, as on a cluster; the others train in this process.
        settings = recipe(tiny_recipe, task__prefix=prefix, workers__num=int(mode == "stage"))
        found[mode] = weights(job.train(settings, tiny_recipe, tmp_path / mode).run_dir)
    for mode in ("stage", "cache"):
        for name, value in found["worker"].items():
            assert torch.equal(value, found[mode][name]), (mode, name)


def test_a_cache_serves_a_window_that_starts_later(tiny_recipe: Path, cache: Path) -> None:
    later = {"task__window__last": 1}
    cached = RewardTuningTask(recipe(tiny_recipe, task__prefix={"mode": "cache", "cache": str(cache)}, **later))
    table = pyarrow.parquet.read_table(cache / "part-000000.parquet").slice(0, 4)
    columns = {name: np.array(table[name].to_pylist()) for name in table.column_names}
    found = cached.step(Rows([0, 1, 2, 3], columns))
    wanted = RewardTuningTask(recipe(tiny_recipe, **later)).step(
        Rows([0, 1, 2, 3], {name: columns[name] for name in ("input_ids", "prompt")})
    )
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())


def test_filling_goes_on_where_it_stopped(
    tiny_recipe: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix_cache, "SAMPLES_PER_PART", 4)
    copy = tmp_path / "cache"
    shutil.copytree(cache, copy)
    parts = sorted(copy.glob("part-*"))
    kept = {path.name: path.stat().st_mtime_ns for path in parts}
    parts[1].unlink()
    fill_prefix_cache(recipe(tiny_recipe), tiny_recipe, str(copy), num_actors=1)
    changed = [path.name for path in sorted(copy.glob("part-*")) if path.stat().st_mtime_ns != kept[path.name]]
    assert changed == [parts[1].name]
    assert all((copy / name).read_bytes() == (cache / name).read_bytes() for name in kept)


def test_a_cache_grows_from_a_short_last_part(
    tiny_recipe: Path, tmp_path: Path, prepared: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of 2 steps: 3 steps, then 5, then 4, which leaves the fifth."""
    monkeypatch.setattr(prefix_cache, "SAMPLES_PER_PART", 8)
    grown, steps = tmp_path / "grown", [pyarrow.parquet.read_table(path) for path in sorted(cache.glob("part-*"))]
    grown.mkdir()
    manifest = json.loads((cache / "prefix.json").read_text())
    (grown / "prefix.json").write_text(json.dumps({**manifest, "steps_per_part": 2}))
    short = grown / "part-000001.parquet"
    pyarrow.parquet.write_table(pyarrow.concat_tables(steps[:2]), grown / "part-000000.parquet")
    pyarrow.parquet.write_table(steps[2], short)
    for num_steps in (5, 4):
        longer = recipe(tiny_recipe, run__num_steps=num_steps)
        assert fill_prefix_cache(longer, tiny_recipe, str(grown), num_actors=1) == 20
        found = pyarrow.concat_tables(pyarrow.parquet.read_table(path) for path in sorted(grown.glob("part-*")))
        assert found["index"].to_pylist() == [*range(20)]
    assert found.slice(0, 12).equals(pyarrow.concat_tables(steps))

    filled = recipe(tiny_recipe, task__prefix={"mode": "cache", "cache": str(grown)}, run__num_steps=5)
    digest = describe(prepared / "rows").digest
    assert prepared_earlier(filled, prepared, digest).num_rows == 20
    pyarrow.parquet.write_table(steps[2], short)  # as a cache was left that grew before parts were counted
    with pytest.raises(RecipeError, match="holds only some of the 20 samples needed"):
        prepared_earlier(filled, prepared, digest)


def test_actors_need_nothing_of_the_drivers_disk(
    tiny_recipe: Path, tmp_path: Path, cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows are moved to the cache instead of copied, and go when it is full."""
    put, moved = storage.put, []

    def move(source: Path, url: str) -> None:
        put(source, url)
        shutil.rmtree(source)
        moved.append(url)

    monkeypatch.setattr(storage, "put", move)
    fill_prefix_cache(recipe(tiny_recipe), tiny_recipe, str(tmp_path / "cache"), num_actors=1)
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["part-000000.parquet", "prefix.json"]
    assert len(moved) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 8}, "made from something else: seed: there 7, here 8"),
        ({"task.rollout.guidance_scale": 2.0}, "made from something else: rollout"),
        (
            {"model.path": "another"},
            "made from something else: unet_sha256: there .*, here .*; noise: .*epsilon.*v_pred",
        ),
        ({"task.window.last": 3}, "reaches denoising step 2, but the window starts at 1"),
        ({"run.num_steps": 9}, "holds 12 of the 36 samples needed; go on with: craftor prefix"),
        ({"task.train": {"unet": {}}}, 'prefix.mode = "cache": the prefix changes while the UNet trains'),
        ({"task.window.outside": "tuned"}, 'with window.outside = "tuned" the prefix changes while the encoder'),
        ({"task.prefix.cache": "nowhere"}, "no prefix.json there; fill it with: craftor prefix"),
    ],
)
def test_a_cache_that_does_not_fit_is_refused(
    tiny_recipe: Path, tmp_path: Path, prepared: Path, cache: Path, change: dict, message: str
) -> None:
    overrides = {**QUICK, "task.prefix": {"mode": "cache", "cache": str(cache)}, **change}
    if "model.path" in change:
        overrides["model.path"] = str(another_model(Path(load(tiny_recipe).model.path), tmp_path))
    with pytest.raises(RecipeError, match=message):
        prepared_earlier(load(tiny_recipe, overrides), prepared, describe(prepared / "rows").digest)


def another_model(pipeline: Path, folder: Path) -> Path:
    """A copy whose UNet has one other weight and predicts velocity."""
    shutil.copytree(pipeline, folder / "another")
    weights = folder / "another" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_in.bias"][0] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    scheduler = folder / "another" / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace('"epsilon"', '"v_prediction"'))
    return folder / "another"


def test_a_cache_of_other_prompts_is_refused(tiny_recipe: Path, tmp_path: Path, cache: Path) -> None:
    overrides = {**QUICK, "task.prefix": {"mode": "cache", "cache": str(cache)}, "data.max_rows": 3}
    with pytest.raises(RecipeError, match="made from something else: prompts_sha256"):
        job.train(load(tiny_recipe, overrides), tiny_recipe, tmp_path / "run")


def test_latents_that_are_not_finite_are_refused(tiny_recipe: Path) -> None:
    task = RewardTuningTask(recipe(tiny_recipe))
    ids = task.diffuser.tokenize(["a ring"])["text_encoder"].numpy()
    columns = {"input_ids": ids, "prompt": np.array(["a ring"], dtype=object), LATENTS: np.full((1, 256), np.nan)}
    with pytest.raises(ValueError, match="prefix latents of sample 5 are not finite"):
        task.step(Rows([5], columns))


def test_shares_are_read_in_any_order(tmp_path: Path) -> None:
    for part in (0, 1):
        index = list(range(4 * part, 4 * part + 4))
        table = pyarrow.table({"index": index, "prompt": [f"prompt {i}" for i in index]})
        pyarrow.parquet.write_table(table, tmp_path / f"{part}.parquet")
    reader = ReadShare(str(tmp_path), num_rows=8, batch_size=4, offset=2, share=2, start_step=0)
    for step in (0, 1, 4, 2):
        rows = opened(reader({"id": np.array([step])}))
        assert rows.position == [4 * step + 2, 4 * step + 3]
        assert rows.columns["index"].tolist() == [position % 8 for position in rows.position]
        assert rows.columns["prompt"].tolist() == [f"prompt {position % 8}" for position in rows.position]
