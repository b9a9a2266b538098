"""Validations of checkpoints: what they measure, what is said of those that failed, recipes that cannot have one."""

import json
from pathlib import Path

import pytest

from craftor import checkpoint, validation
from craftor.recipe import RecipeError, load
from craftor.run_files import VALIDATIONS, notes, write_json
from craftor.tasks import build

PROMPTS = ["a small red star", "a large blue ring", "a large red star"]


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "held_out.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return str(path)


def test_an_untrained_checkpoint_scores_as_the_base_does(tiny_recipe: Path, prompts: str, tmp_path: Path) -> None:
    recipe = load(tiny_recipe, {"workers.num": 1, "validation": {"prompts": prompts, "num_prompts": 3}})
    build(recipe).save(tmp_path)
    rows = [{"number": i, "index": i, "prompt": prompt, "description": None} for i, prompt in enumerate(PROMPTS)]
    scores = validation.measure(recipe, tmp_path, rows)
    assert scores.keys() == {"clip", "pick", "total"}
    for row in scores.values():
        assert row["delta"] == pytest.approx(0, abs=1e-6) and row["base"] == pytest.approx(row["tuned"])


def test_a_checkpoint_of_which_nothing_was_found_is_noted(tiny_recipe: Path, prompts: str, tmp_path: Path) -> None:
    recipe = load(tiny_recipe, {"workers.num": 1, "validation.prompts": prompts})
    for step in (4, 8):
        trainer = tmp_path / "checkpoints" / checkpoint.folder_name(step) / "trainer"
        trainer.mkdir(parents=True)
        write_json(trainer / "state.json", {"step": step})
    (tmp_path / VALIDATIONS).mkdir()
    write_json(tmp_path / VALIDATIONS / f"{checkpoint.folder_name(8)}.json", {"step": 8, "metrics": {}})
    validation.collect(recipe, tmp_path)
    assert notes(tmp_path) == ["the checkpoint of step 4 was not validated: its task failed, or took too long"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"workers.num": 0}, "workers.num = 0, and nothing runs beside it"),
        ({"validation.num_prompts": 1}, "validation.num_prompts"),
        ({"task.rewards.clip": {"kind": "pick_score", "weights": "x", "weight": 1.0}}, "clip_score"),
    ],
    ids=str,
)
def test_a_validation_that_cannot_be_is_refused(tiny_recipe: Path, prompts: str, changes: dict, expected: str) -> None:
    with pytest.raises(RecipeError, match=expected):
        load(tiny_recipe, {"workers.num": 1, "validation.prompts": prompts, **changes})
