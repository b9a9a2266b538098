"""Prompt suites: the published files are read whole, by category; another version, a missing category are refused."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from craftor import suites
from craftor.suites import SUITES, Row, SuiteError, load, select

DATA = Path(os.environ.get("CRAFTOR_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
WHERE = {
    "parti": "partiprompts",
    "hpsv2": "hpsv2_benchmark/hpsv2_benchmark_prompts.json",
    "drawbench": "drawbench/drawbench.csv",
    "geneval": "geneval",
    "t2i_compbench": "t2i_compbench",
    "dpg_bench": "dpg_bench",
    "pick_a_pic": "pickapic/pickapic_test.txt",
    "open_prompts": "openprompts/openprompts_1k.csv",
}
PROMPTS = {"open_prompts": 989}  # of 998 rows, nine are empty


@pytest.mark.parametrize("name", SUITES)
def test_published_files_are_read_whole(name: str) -> None:
    where = DATA / WHERE[name]
    if not where.exists():
        pytest.skip(f"no {where}")
    rows, suite = load(name, str(where)), SUITES[name]
    assert len(rows) == PROMPTS.get(name, suite.num_rows)
    assert all(row.prompt == row.prompt.strip() != "" for row in rows)
    assert all(len(row.categories) == len(suite.columns) for row in rows)


def test_categories_of_the_published_files() -> None:
    if not (DATA / "partiprompts").exists():
        pytest.skip("no PartiPrompts")
    parti = load("parti", str(DATA / "partiprompts"))
    assert [len({row.categories[column] for row in parti}) for column in (0, 1)] == [12, 11]
    animals = select("parti", parti, "Animals")
    assert len(animals) == sum(row.categories[0] == "Animals" for row in parti) > 100
    few = select("parti", parti, limit=96)
    assert len(few) == 96 and len({parti[index].categories[0] for index in few}) == 12, "evenly over the sorted file"
    styles = [row.categories[0] for row in load("hpsv2", str(DATA / WHERE["hpsv2"]))]
    assert {style: styles.count(style) for style in styles} == {
        "anime": 800,
        "concept-art": 800,
        "paintings": 800,
        "photo": 800,
    }


@pytest.fixture
def tiny_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A suite of the layout of PartiPrompts with three prompts."""
    path = tmp_path / "PartiPrompts.tsv"
    path.write_text('Prompt\tCategory\tChallenge\na "star\tShapes\tBasic\nring\tShapes\tColour \ncat\tAnimals\tBasic\n')
    rows = [Row('a "star', ("Shapes", "Basic")), Row("ring", ("Shapes", "Colour")), Row("cat", ("Animals", "Basic"))]
    monkeypatch.setitem(SUITES, "parti", replace(SUITES["parti"], num_rows=3, sha256=suites.digest(rows)))
    return path


def test_a_file_or_its_folder(tiny_suite: Path) -> None:
    rows = load("parti", str(tiny_suite))
    assert rows == load("parti", str(tiny_suite.parent)) == load("parti", tiny_suite.as_uri())
    assert rows[0].prompt == 'a "star' and rows[1].categories == ("Shapes", "Colour")
    assert select("parti", rows, "Basic") == [0, 2] and select("parti", rows, limit=2) == [0, 1]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("cat\tAnimals\tBasic\n", "", "has 2 prompts, this suite has 3: another version"),
        ("cat", "dog", "3 prompts, as it should, but other text"),
        ("cat\tAnimals", "cat\t", "prompt 2 of .* 'cat', has no Category"),
        ("Challenge", "Difficulty", "has no column 'Challenge'"),
    ],
)
def test_another_version_is_refused(tiny_suite: Path, old: str, new: str, message: str) -> None:
    tiny_suite.write_text(tiny_suite.read_text().replace(old, new, 1))
    with pytest.raises(SuiteError, match=message):
        load("parti", str(tiny_suite))


def test_what_is_not_there_says_how_to_fetch_it(tmp_path: Path, tiny_suite: Path) -> None:
    with pytest.raises(SuiteError, match=r"cannot be read.*curl --remote-name-all https://.*PartiPrompts.tsv"):
        load("parti", str(tmp_path / "none"))
    with pytest.raises(SuiteError, match="unknown; allowed: parti, hpsv2, drawbench"):
        load("partii")
    with pytest.raises(SuiteError, match=r"no category 'Plants'; there are Animals \(Category\), Basic \(Challenge\)"):
        select("parti", load("parti", str(tiny_suite)), "Plants")


def test_other_layouts_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "hpsv2_benchmark_prompts.json"
    path.write_text(json.dumps(["a list", "of prompts"]))
    with pytest.raises(SuiteError, match="another layout"):
        load("hpsv2", str(path))


def test_a_folder_of_one_file_a_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("b", "two\n  rings "), ("a", "one star")):
        (tmp_path / f"{name}.txt").write_text(text)
    rows = [Row("one star"), Row("two rings")]
    monkeypatch.setitem(SUITES, "dpg_bench", replace(SUITES["dpg_bench"], num_rows=2, sha256=suites.digest(rows)))
    assert load("dpg_bench", str(tmp_path)) == rows
