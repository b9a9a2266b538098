"""Evaluation as a resumable job: the same images for any number of actors, none made twice, none mixed up."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextModel

from craftor import evaluate as job
from craftor import evaluation_files, suites
from craftor.evaluate import Asked, Tuned, evaluate
from craftor.evaluation_actor import Scorer
from craftor.evaluation_files import EvaluationError, parts
from craftor.recipe import Recipe
from craftor.recipe import load as load_recipe
from craftor.suites import Row
from craftor_rewards.paper import paper_scores

NUM_PROMPTS = 26


@pytest.fixture(scope="module")
def tuned(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Tuned]:
    """An encoder that differs from the tiny pipeline's in every weight."""
    folder = tmp_path_factory.mktemp("tuned")
    encoder = CLIPTextModel.from_pretrained(tiny / "pipeline" / "text_encoder")
    torch.manual_seed(5)
    for parameter in encoder.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    encoder.save_pretrained(folder / "text_encoder")
    return [Tuned(str(folder), 1.0, (2, 4))]


@pytest.fixture
def recipe(tiny_recipe: Path, tmp_path: Path) -> Recipe:
    prompts = [f"{number} {'small' if number % 2 else 'large'} red stars" for number in range(NUM_PROMPTS)]
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    section = {"prompts": str(tmp_path / "held_out.jsonl"), "num_prompts": NUM_PROMPTS, "num_seeds": 2}
    return load_recipe(tiny_recipe, {"evaluation": section})


def test_parts_are_batches_that_begin_anew_with_each_hundred() -> None:
    assert [len(part) for part in parts(130)] == [12] * 8 + [4] + [12, 12, 6]
    assert [number for part in parts(130) for number in part] == list(range(130))


def test_variants_made_together_are_what_each_is_alone(
    recipe: Recipe, tuned: list[Tuned], tiny: Path, tmp_path: Path
) -> None:
    """The base's path is left at different steps: earlier, later, and at once by another UNet."""
    late = {"folder": tuned[0].folder, "weight": 1.0, "steps": (2, 4)}
    mixtures = {"late": [late], "early": [late | {"weight": 0.5, "steps": (1, 4)}]}
    unet = UNet2DConditionModel.from_pretrained(tiny / "pipeline" / "unet")
    for parameter in unet.parameters():
        parameter.data *= 1.1
    unet.save_pretrained(tmp_path / "other" / "unet")
    mixtures["unet"] = [{"folder": str(tmp_path / "other"), "weight": 1.0, "steps": (0, 4)}]
    given = recipe.model_dump(by_alias=True)
    rows = job.held_out_prompts(recipe.evaluation)[:3]
    together = Scorer(given, mixtures, 3, num_strips=3).images(rows)
    kept = ("base", "w0.25", "w0.5", "w0.75")
    assert {image["variant"] for image in together} == {*kept, "late", "early", "unet"}
    assert len({image["clip"] for image in together if (image["number"], image["seed"]) == (0, 0)}) == 7, "all differ"
    for number, name in enumerate(mixtures):
        alone = Scorer(given, {"tuned": mixtures[name]}, 3, num_strips=3 if number == 0 else 0).images(rows)
        for image in alone:
            variant = name if image["variant"] == "tuned" else image["variant"]
            (same,) = [
                i
                for i in together
                if (i["number"], i["seed"], i["variant"]) == (image["number"], image["seed"], variant)
            ]
            assert same | {"variant": ""} == image | {"variant": ""}, "to the last bit"


def test_an_evaluation_computes_in_the_precision_asked_for(recipe: Recipe, tuned: list[Tuned]) -> None:
    mixture = {"tuned": [{"folder": tuned[0].folder, "weight": 1.0, "steps": (2, 4)}]}
    scorers = []
    for precision in ("fp32", "bf16"):
        evaluation = recipe.evaluation.model_copy(update={"precision": precision})
        changed = recipe.model_copy(update={"evaluation": evaluation})
        scorers.append(Scorer(changed.model_dump(by_alias=True), mixture, 0))
    assert [scorer.guided.precision for scorer in scorers] == [torch.float32, torch.bfloat16]
    rows = job.held_out_prompts(recipe.evaluation)[:3]
    exact, rounded = ([image["clip"] for image in scorer.images(rows)] for scorer in scorers)
    assert exact != rounded and exact == pytest.approx(rounded, abs=0.05)


def test_the_total_is_what_was_trained(recipe: Recipe, tuned: list[Tuned]) -> None:
    """Weights of scaled scores, as in the objective."""
    data = recipe.model_dump(by_alias=True)
    data["task"]["rewards"]["clip"] |= {"weight": 0.5, "scale": 100.0}
    mixture = {"tuned": [{"folder": tuned[0].folder, "weight": 1.0, "steps": (2, 4)}]}
    for image in Scorer(data, mixture, 0, num_strips=0).images(job.held_out_prompts(recipe.evaluation)[:2]):
        assert image["total"] == pytest.approx(50 * image["clip"] + 0.5 * image["pick"], rel=1e-5)


@pytest.mark.ray
def test_interrupted_by_two_actors_and_finished_is_what_one_actor_makes(
    cluster: None, recipe: Recipe, tuned: list[Tuned], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, broken = tmp_path / "alone", tmp_path / "broken"
    evaluate(recipe, tuned, alone, 1)
    write, written = evaluation_files.write_part, []

    def stop_at_the_second(folder: Path, part: int, packed: bytes) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(part)
        write(folder, part, packed)

    monkeypatch.setattr(evaluation_files, "write_part", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        evaluate(recipe, tuned, broken, 2)
    with pytest.raises(EvaluationError, match="unfinished, 2 of 3 parts are missing"):
        evaluation_files.read(broken)
    (done,) = (broken / "parts").iterdir()
    when = done.stat().st_mtime_ns

    def count(folder: Path, part: int, packed: bytes) -> None:
        written.append(part)
        write(folder, part, packed)

    monkeypatch.setattr(evaluation_files, "write_part", count)
    evaluate(recipe, tuned, broken, 2)
    assert sorted(written) == [0, 1, 2] and done.stat().st_mtime_ns == when, "each part was made once"
    for name in ("images.jsonl", "summary.json", "samples.json"):
        assert (alone / name).read_bytes() == (broken / name).read_bytes(), name
    images = evaluation_files.read(alone).images
    kinds = [(image["number"], image["seed"], image["variant"]) for image in images]
    assert len(kinds) == len(set(kinds)) == NUM_PROMPTS * (2 * 2 + 3)
    assert len(list((alone / "samples").iterdir())) == 16 * (2 * 2 + 3)


@pytest.fixture
def without_ray(recipe: Recipe, tuned: list[Tuned], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts are made in this process when the folder is begun, so that no job is left to do."""
    begin = evaluation_files.begin

    def begin_and_fill(folder: Path, about: dict[str, Any]) -> None:
        begin(folder, about)
        evaluation = recipe.evaluation
        assert evaluation is not None
        evaluation = evaluation.model_copy(update={"num_seeds": about["num_seeds"]})
        changed = recipe.model_copy(update={"evaluation": evaluation, "seed": about["seed"]})
        members = [{"folder": t.folder, "weight": t.weight, "steps": t.steps} for t in tuned]
        scorer = Scorer(changed.model_dump(by_alias=True), {"tuned": members}, about["num_kept"], about["paper"])
        for number, part in enumerate(parts(len(ROWS))):
            images = scorer.images(ROWS[part.start : part.stop])
            evaluation_files.write_part(folder, number, evaluation_files.pack(images))

    monkeypatch.setattr(evaluation_files, "begin", begin_and_fill)


ROWS: list[dict[str, Any]] = []


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Sequence[dict[str, Any]]:
    """Of a suite with two columns and eight prompts."""
    found = [Row(f"{n} red stars", ("odd" if n % 2 else "even", "low" if n < 4 else "high")) for n in range(8)]
    suite = replace(suites.SUITES["parti"], num_rows=8, sha256=suites.digest(found))
    monkeypatch.setitem(suites.SUITES, "parti", suite)
    monkeypatch.setattr(suites, "_rows", lambda name, where: found)
    ROWS[:] = job.suite_prompts(Asked(suite="parti"))
    return ROWS


def test_a_suite_by_category_with_the_papers_scores(
    rows: Sequence[dict[str, Any]], without_ray: None, recipe: Recipe, tuned: list[Tuned], tmp_path: Path
) -> None:
    summary = evaluate(recipe, tuned, tmp_path / "suite", 1, Asked(suite="parti", seed=3, num_kept=2, paper=True))
    found = {(row["column"], row["category"], row["metric"]): row for row in summary["categories"]}
    assert {key[:2] for key in found} == {
        ("", "all"),
        *(("Category", c) for c in ("even", "odd")),
        *(("Challenge", c) for c in ("low", "high")),
    }
    assert {key[2] for key in found} == {"clip", "pick", "total", "clip_paper", "pick_paper", "diversity"}
    everything, even = found["", "all", "clip"], found["Category", "even", "clip"]
    assert everything["num_prompts"] == 8 and even["num_prompts"] == 4
    images = evaluation_files.read(tmp_path / "suite").images
    values = [i["clip"] for i in images if i["variant"] == "tuned" and i["number"] % 2 == 0]
    assert even["tuned"] == pytest.approx(np.mean(values))
    assert everything["tuned_ci95"][0] <= everything["tuned"] <= everything["tuned_ci95"][1]
    assert all(row["p"] <= row["p_holm"] <= 1 for row in summary["categories"])
    assert not summary["metrics"]["clip_paper"]["held_out"]
    assert sum(image["png"] is not None for image in images) == 2 * (2 * 2 + 3)
    members = [{"folder": tuned[0].folder, "weight": 1, "steps": (2, 4)}]
    scorer = Scorer(recipe.model_dump(by_alias=True), {"tuned": members}, 0, True)
    pictures, prompts = torch.rand(8, 3, 32, 32), [row["prompt"] for row in rows]
    scores = scorer._paper_scores(pictures, prompts)["pick_paper"]
    four = paper_scores(scorer.rewards["pick"], pictures[:4], prompts[:4])
    assert torch.equal(scores[:4], four), "pairs of four"
    plain = scorer._scores(pictures, prompts, [None] * 8)["pick"]
    assert (scores - plain).abs().max() > 1e-3, "the papers' way is another"


def test_images_of_something_else_are_refused(
    rows: Sequence[dict[str, Any]], without_ray: None, recipe: Recipe, tuned: list[Tuned], tiny: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    evaluate(recipe, tuned, out, 1, Asked(suite="parti", num_seeds=1))
    before = (out / "images.jsonl").read_bytes()
    other = recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": str(tiny / "sd2")})})
    halved = [replace(tuned[0], weight=0.5)]
    for changed, members, asked, message in (
        (other, tuned, Asked(suite="parti", num_seeds=1), "images from another base"),
        (recipe, halved, Asked(suite="parti", num_seeds=1), "images from other encoders"),
        (recipe, tuned, Asked(suite="parti", num_seeds=1, category="odd"), "images of other prompts"),
        (recipe, tuned, Asked(suite="parti", num_seeds=1, seed=8), "images from other noise"),
        (recipe, tuned, Asked(suite="parti"), "another number of images a prompt"),
        (recipe, tuned, Asked(suite="parti", num_seeds=1, paper=True), "an evaluation with another paper"),
    ):
        with pytest.raises(EvaluationError, match=f"{message}: .* there, .* here; choose another --out"):
            evaluate(changed, members, out, 1, asked)
    assert (out / "images.jsonl").read_bytes() == before
    with pytest.raises(EvaluationError, match="--category odd goes with --suite"):
        evaluate(recipe, tuned, out, 1, Asked(category="odd"))
    with pytest.raises(EvaluationError, match="no evaluation there"):
        evaluation_files.read(tmp_path)
