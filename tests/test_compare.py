"""Comparing evaluated runs: paired by construction, refused where they are not; and a blind page to vote on."""

import io
import json
import os
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from craftor import evaluation_files
from craftor.blind import VotesError, load_votes, tally, wilson, write_page
from craftor.comparison import compare
from craftor.comparison_page import write_comparison
from craftor.evaluation_files import EvaluationError, pack, parts

CHROMIUM = Path("/usr/bin/chromium")
NUM_PROMPTS, NUM_KEPT = 40, 4
HOSTILE = "a ring </script><script>alert(1)</script> & $5"
COLOURS = {"base": (200, 30, 30), "good": (30, 160, 60), "bad": (40, 60, 200)}


def png(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(buffer, format="PNG")
    return buffer.getvalue()


def write_run(folder: Path, gain: float, **about: Any) -> Path:
    """A run's folder with an evaluation of made-up scores, `gain` above those of a base that all share."""
    generator = np.random.default_rng(0)
    described = {
        "base_sha256": "b" * 64,
        "variants": {"tuned": [{"sha256": "t" * 64, "weight": 1.0, "steps": [2, 4]}]},
        "prompts": {"suite": None, "num": NUM_PROMPTS, "sha256": "p" * 64},
        "seed": 0,
        "num_seeds": 2,
        "rollout": {"num_steps": 4},
        "trained": ["clip", "clip_paper", "total"],
    }
    evaluation = folder / "evaluation"
    evaluation_files.begin(evaluation, described | about)
    own = np.random.default_rng(zlib.crc32(folder.name.encode()))
    for part, numbers in enumerate(parts(NUM_PROMPTS)):
        images = []
        for number in numbers:
            for seed in range(2):
                base = generator.normal(5, 1, size=2)
                for variant, change in (("base", np.zeros(2)), ("tuned", own.normal((gain, 0), 0.2))):
                    colour = COLOURS["base" if variant == "base" else folder.name.rstrip("-2")]
                    clip, pick = base + change
                    images.append(
                        {"number": number, "prompt": HOSTILE, "seed": seed, "variant": variant}
                        | {"clip": clip, "pick": pick, "feature": np.eye(4)[seed].tolist()}
                        | {"png": png(colour) if number < NUM_KEPT else None}
                    )
        evaluation_files.write_part(evaluation, part, pack(images))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [write_run(tmp_path / "good", 0.5), write_run(tmp_path / "bad", -0.3)]


def test_pairs_are_paired_and_corrected(runs: list[Path]) -> None:
    comparison = compare(runs)
    assert comparison.variants == ["base", "good", "bad"] and comparison.left_out == []
    clip, pick, diversity = comparison.metrics
    found = {(pair["of"], pair["over"]): pair for pair in clip["pairs"]}
    assert found.keys() == {("good", "base"), ("bad", "base"), ("bad", "good")}
    assert found["good", "base"]["delta"] == pytest.approx(0.5, abs=0.08)
    assert found["bad", "good"]["delta"] == pytest.approx(-0.8, abs=0.08)
    assert found["bad", "good"]["ci95"][1] < -0.7 and found["good", "base"]["win_rate"] > 0.95
    assert clip["means"]["base"]["ci95"][0] < clip["means"]["base"]["mean"] < clip["means"]["base"]["ci95"][1]
    assert not clip["held_out"] and pick["held_out"] and diversity["held_out"]
    assert all(pair["p_holm"] < 0.05 for pair in clip["pairs"])
    assert not any(pair["p_holm"] < 0.05 for pair in pick["pairs"])
    # Nine tests, of which three have the smallest p there is.
    assert sorted(pair["p_holm"] for pair in clip["pairs"])[0] == pytest.approx(9 / 10_001)


def test_what_one_of_them_trained_on_is_no_evidence(tmp_path: Path) -> None:
    """Even where it is no reward's name: an oracle's attributes, or a reward as the paper scored it."""
    runs = [write_run(tmp_path / "good", 0.5, trained=["pick", "total"]), write_run(tmp_path / "bad", -0.3)]
    assert {row["metric"]: row["held_out"] for row in compare(runs).metrics} == {
        "clip": False,
        "pick": False,
        "diversity": True,
    }


def test_every_run_has_a_name_of_its_own(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / place / name, 0.5) for place, name in (("a", "good2"), ("a", "good"), ("b", "good"))]
    assert list(compare(runs).runs) == ["good2", "good", "good-2"]
    runs = [write_run(tmp_path / place / name, 0.5) for place, name in (("c", "good-2"), ("c", "good"), ("d", "good"))]
    compared = compare(runs).runs
    assert {name: run.folder.parent for name, run in compared.items()} == {
        "good-2": runs[0],
        "good": runs[1],
        "good-3": runs[2],
    }


def test_rendering(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    paths = write_comparison([runs[0], runs[1] / "evaluation"], out)
    names = [path.name for path in paths]
    assert names == ["compare.html", "compare.json", "compare.md", "contact-1.png", "blind.html"]
    html = re.sub(r'"data:[^"]*"', '""', paths[0].read_text())
    assert "http://" not in html and "https://" not in html and "<script" not in html
    assert "40 held-out prompts × 2 seeds" in html and "bad − good" in html
    clip = next(row for row in json.loads(paths[1].read_text())["metrics"] if row["metric"] == "clip")
    delta = next(pair for pair in clip["pairs"] if pair["of"] == "good")["delta"]
    assert f"{delta:+.3f}" in html and f"{delta:+.3f}" in paths[2].read_text()
    assert paths[2].read_text().splitlines()[0] == "| metric | base | good | bad |"
    with Image.open(paths[3]) as sheet:
        assert sheet.width == 10 + 3 * 202
        row = [sheet.getpixel((10 + 202 * column + 96, 44 + 40 + 96)) for column in range(3)]
    assert row == [COLOURS["base"], COLOURS["good"], COLOURS["bad"]], "a column each, in order"


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"base_sha256": "c" * 64}, "good2 cannot be compared with good: images from another base"),
        ({"seed": 1}, "images from other noise: 0 there, 1 here"),
        ({"prompts": {"suite": "parti", "num": NUM_PROMPTS, "sha256": "q" * 64}}, "images of other prompts"),
    ],
)
def test_what_is_not_comparable_is_refused(tmp_path: Path, about: dict[str, Any], message: str) -> None:
    runs = [write_run(tmp_path / "good", 0.5), write_run(tmp_path / "good2", 0.5, **about)]
    with pytest.raises(EvaluationError, match=message):
        compare(runs)


def test_unfinished_runs_are_refused(runs: list[Path], tmp_path: Path, tiny_recipe: Path) -> None:
    (runs[1] / "recipe.toml").write_text(tiny_recipe.read_text())
    state = runs[1] / "checkpoints" / "step-000008" / "trainer" / "state.json"
    state.parent.mkdir(parents=True)
    state.write_text('{"step": 8}')
    (state.parents[1] / "manifest.json").write_text("{}")
    with pytest.raises(EvaluationError, match=r"unfinished, 8 of 24 steps are done; go on by: craftor train --resume"):
        compare(runs)
    state.write_text('{"step": 24}')
    assert compare(runs).variants == ["base", "good", "bad"]
    (runs[0] / "evaluation" / "parts" / "part-000001.parquet").unlink()
    with pytest.raises(EvaluationError, match="unfinished, 1 of 4 parts are missing"):
        compare(runs)
    with pytest.raises(EvaluationError, match="no evaluation there"):
        compare([tmp_path])


def votes_file(path: Path, choices: dict[tuple[int, int], str], comparison: str = "x") -> Path:
    """`base` on the left of `good`."""
    votes = [
        {"number": number, "seed": seed, "left": "base", "right": "good", "choice": choice}
        for (number, seed), choice in choices.items()
    ]
    path.write_text(json.dumps({"comparison": comparison, "variants": ["base", "good"], "votes": votes}))
    return path


def test_votes_of_two_people_count_by_prompt(tmp_path: Path) -> None:
    first = votes_file(tmp_path / "a.json", {(0, 0): "right", (1, 0): "right", (2, 0): "tie", (3, 0): "left"})
    second = votes_file(tmp_path / "b.json", {(0, 0): "left", (1, 0): "right"})
    (row,) = tally(load_votes([first, second]))
    assert (row["of"], row["over"], row["num_votes"], row["num_prompts"], row["ties"]) == ("good", "base", 6, 4, 1)
    assert row["win_rate"] == pytest.approx((0.5 + 1 + 0.5 + 0) / 4) and (row["left"], row["right"]) == (2, 3)
    assert row["ci95"] == pytest.approx(wilson(0.5, 4))
    assert wilson(1.0, 16) == pytest.approx([16 / (16 + 1.959964**2), 1.0])
    with pytest.raises(VotesError, match="votes on another comparison"):
        load_votes([first, votes_file(tmp_path / "c.json", {(0, 0): "tie"}, "y")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not JSON", "not a file of votes"),
        ('{"votes": []}', "not a file of votes .KeyError: 'comparison'"),
        ('{"comparison": "x", "variants": ["base", "good"], "votes": []}', "no votes"),
        ('{"comparison": "x", "variants": ["base", "good"], "votes": [{"choice": "up"}]}', "choice is 'up', allowed"),
        (
            '{"comparison": "x", "variants": ["base", "good"], "votes": '
            '[{"number": 0, "seed": 0, "left": "base", "right": "none", "choice": "tie"}]}',
            "'base' against 'none', allowed: two of base, good",
        ),
    ],
)
def test_other_files_are_no_votes(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "votes.json"
    path.write_text(text)
    with pytest.raises(VotesError, match=message):
        load_votes([path])


@pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no {CHROMIUM}")
@pytest.mark.parametrize("width", [1200, 390])
def test_voting_in_a_browser(runs: list[Path], tmp_path: Path, width: int) -> None:
    """Someone who always likes green best makes `good` win every pair, whatever the sides."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    page_file = write_page(tmp_path / "blind.html", compare(runs[:1]))
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900}, accept_downloads=True)
        errors: list[str] = []
        page.on("console", lambda said: errors.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("dialog", lambda dialog: errors.append(dialog.message))
        page.goto(page_file.as_uri())
        assert page.locator("h1").inner_text() == HOSTILE, "text, not markup"
        assert "good" not in page.locator("main").inner_text(), "blind"
        if folder := os.environ.get("CRAFTOR_SCREENSHOTS"):
            page.screenshot(path=f"{folder}/blind-{width}.png", full_page=True)
        overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert overflow <= 0, "nothing sticks out sideways"
        green = page.evaluate("data.pictures[0].shown[1]")
        for vote in range(NUM_KEPT * 2):
            left = page.locator("#left img").get_attribute("src")
            if vote % 2:
                page.keyboard.press("ArrowLeft" if left == green else "ArrowRight")
            else:
                page.locator("#left" if left == green else "#right").click()
            if vote == 3:  # a slip of the finger, taken back
                page.keyboard.press("ArrowDown")
                page.get_by_role("button", name="Back").click()
        assert "last pair" in page.locator("h1").inner_text()
        with page.expect_download() as download:
            page.get_by_role("button", name="Save votes").click()
        download.value.save_as(tmp_path / "votes.json")
        assert errors == []
        browser.close()
    found = load_votes([tmp_path / "votes.json"])
    (row,) = tally(found)
    assert row["win_rate"] == 1 and row["num_votes"] == NUM_KEPT * 2 and row["num_prompts"] == NUM_KEPT
    assert row["ci95"] == pytest.approx([NUM_KEPT / (NUM_KEPT + 1.959964**2), 1.0])
