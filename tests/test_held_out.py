"""Held-out prompts: one form of file for evaluation, validation and search; others are refused before training."""

import json
from pathlib import Path

import pytest

from craftor import held_out
from craftor.evaluate import Asked
from craftor.held_out import HeldOutError
from craftor.preflight import check
from craftor.quickstart import evaluate_runs
from craftor.recipe import RecipeError, load


def test_rows_in_order_from_a_file_or_a_url(tmp_path: Path) -> None:
    rows = [{"prompt": "a red star"}, {"prompt": "a blue ring", "description": {"objects": []}}]
    path = tmp_path / "held_out.jsonl"
    path.write_text("\n".join([json.dumps(rows[0]), "", json.dumps(rows[1]), ""]))
    assert held_out.read("evaluation", str(path)) == held_out.read("evaluation", f"file://{path}") == rows
    assert held_out.read("evaluation", str(path), 1) == rows[:1]
    with pytest.raises(HeldOutError, match=r"search\.num_prompts = 3: .*held_out\.jsonl has 2 prompts"):
        held_out.read("search", str(path), 3)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("held_out.txt", b"a red star\n", r"allowed: a \.jsonl file"),
        ("held_out.jsonl", b"a red star\n", "Expecting value: line 1 column 1"),
        ("held_out.jsonl", b'{"prompt": "gr\xfcn"}\n', "codec can't decode byte 0xfc"),
        ("held_out.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', "prompt 2 is no object with a text called prompt"),
        ("held_out.jsonl", b"\n", "holds no prompt"),
        ("held_out.jsonl", None, "no such file"),
    ],
)
@pytest.mark.parametrize("section", ["evaluation", "validation"])
def test_other_files_are_refused_before_training(
    tiny_recipe: Path, tmp_path: Path, section: str, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    changes = {section: {"prompts": str(tmp_path / name), "num_prompts": 2}, "workers.num": 1}
    with pytest.raises(RecipeError, match=message) as error:
        check(load(tiny_recipe, changes), tiny_recipe)
    assert f"{section}.prompts = " in str(error.value)


def test_a_scheme_without_its_package_is_a_mistake_in_one_line(tiny_recipe: Path) -> None:
    with pytest.raises(RecipeError, match=r"data\.path = 'gs://bucket/prompts\.csv': .*gcsfs"):
        check(load(tiny_recipe, {"data.path": "gs://bucket/prompts.csv"}), tiny_recipe)


def test_a_run_without_the_section_is_evaluated_on_prompts_that_are_named(tiny_recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.toml").write_text(tiny_recipe.read_text())
    with pytest.raises(RecipeError, match=r"no \[evaluation\] section.*--prompts FILE\.jsonl or --suite NAME"):
        evaluate_runs([run], tmp_path / "out", 1)
    with pytest.raises(RecipeError, match="no complete checkpoint to evaluate"):
        evaluate_runs([run], tmp_path / "out", 1, Asked(prompts=str(tmp_path / "held_out.jsonl")))
