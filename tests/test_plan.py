"""`craftor plan`: counted work is the work that is done; its sums, and its refusals."""

from pathlib import Path

import pytest
import torch

from craftor import calibrate
from craftor.devices import DEVICES
from craftor.estimate import Prediction, calls, count, predict, summary
from craftor.flops import counting
from craftor.locate import shipped_recipe
from craftor.memory import graph_size
from craftor.recipe import Denoising, Recipe, RecipeError, load
from craftor.tasks import build


@pytest.mark.parametrize(
    "window",
    [
        {"last": 2},
        {"last": 2, "recompute": True},
        {"start": 1, "stop": 2},
        {"preset": "draft_lv"},
        {"last": 3, "recompute": 1},
    ],
    ids=str,
)
def test_counted_work_is_what_a_step_does(tiny_recipe: Path, window: dict) -> None:
    recipe = load(tiny_recipe, {"task.window": window})
    task = build(recipe)
    rows = calibrate.sample_rows(task.diffuser.tokenize([calibrate.PROMPT] * 8), recipe)
    with counting() as counter:
        task.step(rows)
    assert sum(count(recipe).flops.values()) == pytest.approx(counter.get_total_flops() / 8, rel=0.05)


def test_the_shipped_model_is_counted() -> None:
    """Its autoencoder is another class than the tiny one's."""
    recipe = load(shipped_recipe("micro_textcraftor.toml"), {"workers.num": 1, "run.batch_size": 2})
    task = build(recipe)
    rows = calibrate.sample_rows(task.diffuser.tokenize([calibrate.PROMPT] * 2), recipe)
    with counting() as counter:
        task.step(rows)
    assert sum(count(recipe).flops.values()) == pytest.approx(counter.get_total_flops() / 2, rel=0.05)


def test_counted_activations_are_what_the_graphs_hold(tiny_recipe: Path) -> None:
    recipe = load(tiny_recipe, {"run.batch_size": 8})
    task = build(recipe)
    rows = calibrate.sample_rows(task.diffuser.tokenize([calibrate.PROMPT] * 8), recipe)
    with graph_size(
        p for part in (task.diffuser.unet, task.diffuser.vae, task.module) for p in part.parameters()
    ) as held:
        task.step(rows)
    # All rewards' graphs are in the count that is held here, only the largest is alive at a time.
    assert 0.6 < count(recipe).activation_bytes / (held.bytes / 8) < 1.2


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"task.window": {"last": 2}}, (2, 2, 0)),
        ({"task.window": {"last": 2, "recompute": True}}, (2, 2, 2)),
        ({"task.window": {"start": 1, "stop": 2}}, (1, 3, 0)),
        ({"task.window": {"start": 1, "stop": 2, "gradient_path": "direct"}}, (3, 1, 0)),
        ({"task.window": {"preset": "draft_lv"}}, (4, 2, 0)),
        ({"task.window": {"last": 2}, "task.prefix": {"mode": "stage"}}, (0, 2, 0)),
    ],
    ids=str,
)
def test_denoising_calls_of_a_window(tiny_recipe: Path, changes: dict, expected: tuple[float, ...]) -> None:
    assert calls(load(tiny_recipe, changes)) == pytest.approx(expected)


def test_more_devices_are_faster_and_small_ones_do_not_fit(tiny_recipe: Path) -> None:
    recipe = load(tiny_recipe)
    work = count(recipe)
    one, two = (predict(work, recipe, DEVICES["A100-80G"], num, 1, 2.0) for num in (1, 2))
    assert one.fits and two.samples_per_second == pytest.approx(2 * one.samples_per_second)
    assert two.dollars == pytest.approx(one.dollars)
    assert one.bottleneck in one.seconds and sum(one.seconds.values()) == pytest.approx(4 / one.samples_per_second)
    assert "exchanging gradients" in predict(work, recipe, DEVICES["A100-80G"], 2, 2, 2.0).seconds
    huge = predict(work, load(tiny_recipe, {"run.batch_size": 40_000_000}), DEVICES["T4-16G"], 1, 1, 1.0)
    assert not huge.fits
    lines = dict(summary(recipe, huge, "T4-16G", 1))
    assert "does NOT fit" in lines["memory"] and huge.bottleneck in lines["bottleneck"]


def test_half_precision_counts_where_the_device_has_it(tiny_recipe: Path) -> None:
    recipes = {name: load(tiny_recipe, {"model.precision": name}) for name in ("fp32", "fp16", "bf16", "auto")}
    work = {name: count(recipe) for name, recipe in recipes.items()}
    for device, fast in (("T4-16G", {"fp16"}), ("A100-80G", {"fp16", "bf16", "auto"})):
        found = {name: predict(work[name], recipes[name], DEVICES[device], 1, 1, 1.0) for name in recipes}
        seconds = {name: prediction.seconds["denoising with gradient"] for name, prediction in found.items()}
        assert {name for name in seconds if seconds[name] < seconds["fp32"] / 2} == fast, device


def test_shards_take_less_memory_and_more_messages(tiny_recipe: Path) -> None:
    changes = {"task.train": {"unet": {}}, "workers.num": 4}
    whole, sharded = (load(tiny_recipe, {**changes, "workers.strategy": name}) for name in ("ddp", "fsdp"))
    found = [predict(count(recipe), recipe, DEVICES["A100-80G"], 4, 2, 2.0) for recipe in (whole, sharded)]
    assert found[1].memory_gib < found[0].memory_gib
    assert found[1].seconds["gathering weights"] > found[0].seconds["exchanging gradients"]
    # 2 denoising steps without gradient; 2 with, whose weights are gathered twice and whose gradient is handed on.
    assert count(sharded).gathered_bytes == (2 + 3 * 2) * 4 * count(sharded).trained


def test_a_cpu_is_timed(tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "SECONDS", 0.5)
    recipe: Recipe = load(tiny_recipe)
    found = calibrate.predict(recipe, count(recipe))
    assert isinstance(found, Prediction) and found.fits and 0.1 < found.memory_gib < 8
    assert found.hours * 3600 == pytest.approx(24 * 4 / found.samples_per_second)
    assert torch.get_num_threads() == 1


def test_rewards_on_actors_are_measured_here(tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "SECONDS", 0.1)
    recipe = load(tiny_recipe, {"task.rewards.pick.placement": "actors", "task.rewards.pick.replicas": 2})
    work = count(recipe)
    found = calibrate.predict(recipe, work)
    shares = {name: seconds / sum(found.seconds.values()) for name, seconds in found.seconds.items()}
    assert shares["rewards"] > work.flops["rewards"] / sum(work.flops.values())


def test_other_tasks_are_refused(tiny_recipe: Path) -> None:
    other = load(tiny_recipe).model_copy(update={"task": Denoising.model_construct(kind="denoising")})
    with pytest.raises(RecipeError, match="this recipe's task is denoising"):
        count(other)
