"""Every shipped recipe loads; every mistake is one line naming file, key, value and what is allowed."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from craftor.overrides import parse_override
from craftor.preflight import FORMATS, REWARD_KINDS, check
from craftor.prompts import FORMATS as READERS
from craftor.recipe import Recipe, RecipeError, RewardTuning, load
from craftor_rewards import REWARDS

# What `craftor serve` reads has a schema of its own.
RECIPES = sorted(p for p in (Path(__file__).parents[1] / "recipes").glob("*.toml") if "serve" not in p.stem)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipe_loads_and_is_short(path: Path) -> None:
    assert load(path).name
    assert len(path.read_text().splitlines()) <= 50


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "run.num_stps",
            3,
            "run.num_stps: unknown key; allowed here: batch_size, checkpoint_every, micro_batch, num_steps, storage",
        ),
        ("task.window.lst", 3, "task.window.lst: unknown key; allowed here: copies, first, gradient_path, jump, last,"),
        ("optimizer.lr", -1.0, "optimizer.lr: Input should be greater than 0 (got -1.0)"),
        ("optimizer.lr", "fast", "optimizer.lr: Input should be a valid number (got 'fast')"),
        ("run.batch_size", 3.5, "run.batch_size: Input should be a valid integer"),
        ("workers.num", 3, "run.batch_size = 4 is not a multiple of workers.num = 3; allowed: 1, 2, 4"),
        (
            "workers.num",
            [2, 8],
            "workers.num = [2, 8]: expected [least, most] with least <= most <= run.batch_size = 4",
        ),
        ("workers.num", [3, 2], "workers.num = [3, 2]: expected [least, most]"),
        ("task.window.last", 9, "denoising steps -5..3 do not fit in rollout.num_steps = 4; allowed: last <= 4"),
        ("task.window.last", 0, "task.window.last: Input should be greater than or equal to 1 (got 0)"),
        ("task.window", {}, "give exactly one of last, first, start with stop, steps, random_last, sparse (got none"),
        ("task.window", {"last": 1, "first": 2}, "(got last, first)"),
        ("task.window", {"preset": "draft_v3"}, "Input should be 'textcraftor', 'draft', 'draft_lv', 'alignprop'"),
        ("task.window", {"steps": [2, 1]}, "steps = [2, 1]: distinct, in order, and counted in the rollout's own"),
        ("task.window", {"steps": [2, 7]}, "denoising steps 2..7 do not fit in rollout.num_steps = 4"),
        ("task.window", {"random_last": [3, 2]}, "random_last = [3, 2]: expected [low, high]"),
        ("task.window", {"first": 1, "jump": [1, 2]}, "jump goes with last or sparse"),
        ("task.window", {"last": 2, "copies": 2}, "copies = 2 goes with last = 1"),
        ("task.window", {"last": 2, "recompute": "auto"}, 'recompute = "auto" and memory_limit_gib go together'),
        ("task.train", {}, "nothing trains; name at least one of text_encoder, text_encoder_2, unet"),
        ("model.precision", "fp64", "Input should be 'auto', 'fp32', 'bf16' or 'fp16'"),
        ("task.prefix", {"mode": "cache"}, 'mode = "cache" and cache go together'),
        ("task.rollout.solver", "heun", "Input should be 'ddim', 'euler' or 'dpm_solver_2m'"),
        ("task.window", {"start": 3, "stop": 2}, "start = 3 is not before stop = 2"),
        (
            "task.window",
            {"start": 3},
            "give exactly one of last, first, start with stop, steps, random_last, sparse (got start)",
        ),
        (
            "task.rewards.clip.weight",
            -2.0,
            "task.rewards.clip.weight: Input should be greater than or equal to 0 (got -2.0)",
        ),
        (
            "task.rewards.pick.evaluation_only",
            True,
            "allowed: weight > 0 for a trained reward, or evaluation_only = true",
        ),
        ("task.rewards", {}, "no reward has a weight"),
        ("register.aliases", ["Latest"], "'latest' is reserved by MLflow"),
        ("name", "../x", "name: String should match pattern"),
    ],
)
def test_mistakes_are_explained(tiny_recipe: Path, key: str, value: object, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        load(tiny_recipe, {key: value})
    assert str(tiny_recipe) in str(error.value)
    assert message in str(error.value)


def test_settings_that_would_do_nothing_are_refused(tiny_recipe: Path) -> None:
    with pytest.raises(RecipeError, match=r"anchor = 0\.1: it keeps a trained encoder near the original, and none"):
        load(tiny_recipe, {"task.anchor": 0.1, "task.train": {"unet": {}}})
    data = load(tiny_recipe).model_dump(by_alias=True)
    data["model"]["text_encoder"] = "runs/encoder"
    data["task"] = {"kind": "direct_tuning", "rewards": data["task"]["rewards"]}
    with pytest.raises(ValidationError, match='it conditions a window, and task.kind = "direct_tuning" has none'):
        Recipe.model_validate(data)


def test_a_unet_does_not_train_in_float16(tiny_recipe: Path) -> None:
    load(tiny_recipe, {"model.precision": "fp16"})
    with pytest.raises(RecipeError, match="the gradient of UNet weights underflows; allowed: bf16, fp32"):
        load(tiny_recipe, {"model.precision": "fp16", "task.train": {"unet": {}}})


@pytest.mark.parametrize("kind", ["reward_weighted", "policy_gradient", "direct_tuning"])
def test_only_what_scales_its_gradient_computes_in_float16(tiny_recipe: Path, kind: str) -> None:
    data = load(tiny_recipe).model_dump(by_alias=True)
    data["task"] = {"kind": kind, **{key: data["task"][key] for key in ("rollout", "rewards")}}
    data["task"] |= {"window": {"first": 2}, "temperature": 1.0} if kind == "reward_weighted" else {}
    data["model"]["precision"] = "bf16"
    Recipe.model_validate(data)
    data["model"]["precision"] = "fp16"
    with pytest.raises(ValidationError, match=f'kind = "{kind}": its gradient would underflow'):
        Recipe.model_validate(data)


@pytest.mark.parametrize(("window", "stop"), [({"last": 2}, 4), ({"start": 1, "stop": 3}, 3), ({"first": 1}, 1)])
def test_an_evaluation_uses_what_was_tuned(tiny_recipe: Path, window: dict, stop: int) -> None:
    evaluation = {"prompts": "held_out.jsonl", "use_from": stop - 1}
    load(tiny_recipe, {"task.window": window, "evaluation": evaluation})
    with pytest.raises(RecipeError, match=f"use_from = {stop}: no denoising step.*allowed: 0 to {stop - 1}"):
        load(tiny_recipe, {"task.window": window, "evaluation": evaluation | {"use_from": stop}})


def test_an_adapter_of_a_tuned_encoder_is_refused(tiny_recipe: Path) -> None:
    """It would be saved alone, and merged into the base's encoder by whoever loads it."""
    tuned = {"model.text_encoder": "runs/encoder"}
    load(tiny_recipe, {**tuned, "task.train": {"text_encoder": {}, "unet": {"method": "lora"}}})
    with pytest.raises(RecipeError, match="an adapter of text_encoder would be read as one of the base's"):
        load(tiny_recipe, {**tuned, "task.train": {"text_encoder": {"method": "lora"}}})


def test_training_without_the_clip_term_is_refused(tiny_recipe: Path) -> None:
    text = tiny_recipe.read_text()
    tiny_recipe.write_text("\n".join(line for line in text.splitlines() if not line.startswith("clip =")))
    with pytest.raises(RecipeError, match=r"no clip_score among the trained rewards \(pick\)"):
        load(tiny_recipe)


def test_a_missing_or_broken_file_is_explained(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.toml: no such recipe"):
        load(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("name = ")
    with pytest.raises(RecipeError, match=r"bad\.toml: not valid TOML"):
        load(tmp_path / "bad.toml")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "task.rewards.pick.kind",
            "pikscore",
            "unknown reward 'pikscore'; available: aesthetic, clip_score, compressibility",
        ),
        (
            "task.rewards.pick.weights",
            "micro:nothing",
            "micro:nothing: not shipped with craftor_micro; available: micro:",
        ),
        ("model.path", "runs/nowhere", "model.path = 'runs/nowhere': no such folder"),
        ("model.path", "owner/name", "not in the local hub cache, and HF_HUB_OFFLINE is set; fetch it"),
        ("task.rewards.pick.weights", "./nowhere", "task.rewards.pick.weights = './nowhere': no such folder"),
        ("task.rewards.pick.weights", "owner/name", "with: hf download owner/name"),
        ("data.path", "nowhere.txt", "data.path = 'nowhere.txt': no such file"),
        ("data.path", "prompts.pdf", "unknown format; allowed: .csv, .jsonl, .parquet, .tsv, .txt"),
    ],
)
def test_preflight_names_what_is_missing(tiny_recipe: Path, key: str, value: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        check(load(tiny_recipe, {key: value}), tiny_recipe)
    assert str(tiny_recipe) in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"\n\n", "holds no prompt"),
        ("header.csv", b"prompt,seed\n", "holds no prompt"),
        ("other.csv", b"text,seed\na dog,1\n", "data.column = 'prompt': not in "),
        ("latin.txt", "ein grüner Kreis\n".encode("latin-1"), "not UTF-8 at byte 6 (0xfc)"),
        ("broken.jsonl", b'{"prompt": \n', "line 1 is not JSON"),
    ],
)
def test_preflight_reads_the_head_of_the_prompt_file(
    tiny_recipe: Path, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecipeError) as error:
        check(load(tiny_recipe, {"data.path": str(tmp_path / name)}), tiny_recipe)
    assert message in str(error.value)


def test_a_folder_that_is_no_pipeline_is_refused(tiny_recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"a folder but not a pipeline \(no model_index\.json"):
        check(load(tiny_recipe, {"model.path": str(tmp_path)}), tiny_recipe)


def test_what_preflight_writes_out_is_what_there_is() -> None:
    assert set(REWARD_KINDS) == set(REWARDS)
    assert set(FORMATS) == set(READERS)


def test_overrides_are_read_as_toml() -> None:
    assert parse_override("optimizer.lr=1e-4") == ("optimizer.lr", 1e-4)
    assert parse_override("data.path=a.txt") == ("data.path", "a.txt")
    assert parse_override("register.aliases=['a']") == ("register.aliases", ["a"])
    with pytest.raises(RecipeError, match=r"expected key\.path=value"):
        parse_override("lr")


def test_recipe_round_trips_through_its_dump(tiny_recipe: Path) -> None:
    recipe = load(tiny_recipe)
    assert Recipe.model_validate(recipe.model_dump(by_alias=True)) == recipe
    assert isinstance(recipe.task, RewardTuning)
