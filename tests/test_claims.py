"""Claims: declared consistently, judged by their intervals, tested once each and resumable; the same budget for all."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from craftor import evaluation_files
from craftor.claims import curves, effects, grid, judging, making, table, testing
from craftor.claims.all_pairs import AllPairs
from craftor.claims.declared import CLAIMS, Claim, Part
from craftor.claims.effects import Effect, contrast, crossed, together, verdict_of
from craftor.claims.methods import IMAGES, METHODS, REFERENCE, Budget, Images, Method, recipe_of
from craftor.claims.testing import ClaimsError
from craftor.locate import shipped_recipe
from craftor.recipe import RecipeError, load
from craftor_rewards.pick_score import PickScore


def test_every_image_named_is_declared_and_every_method_used() -> None:
    for name, claim in CLAIMS.items():
        assert testing.images_of(claim) <= IMAGES.keys(), name
        assert claim.parts or claim.cost
    assert set(testing.methods_of(IMAGES)) == set(METHODS)
    assert all(len(images.methods) == len(images.weights) for images in IMAGES.values())
    used = {images for claim in CLAIMS.values() for images in testing.images_of(claim)}
    grid = {method for claim in CLAIMS.values() for method in claim.grid}
    assert {*testing.methods_of(used), *grid} == set(METHODS), "no method is trained for nothing"
    assert list(CLAIMS) == [f"C{number}" for number in range(1, 11)]


def test_methods_differ_in_what_they_say_and_share_the_budget(tmp_path: Path) -> None:
    budget = Budget()
    recipes = {}
    for name, method in METHODS.items():
        if method.recipe != REFERENCE and not (shipped_recipe(REFERENCE).parent / method.recipe).exists():
            with pytest.raises(RecipeError, match=f"claims: method {name}: no recipe {method.recipe}"):
                recipe_of(name, 2, budget, tmp_path)
            continue
        recipes[name] = recipe_of(name, 2, budget, tmp_path)
    core_seconds = {n: r.run.num_steps * METHODS[n].seconds for n, r in recipes.items()}
    assert all(abs(found / core_seconds["textcraftor"] - 1) < 0.05 for found in core_seconds.values()), core_seconds
    many = recipes["ddpo"].task.samples_per_prompt
    assert {r.run.batch_size * (many if n == "ddpo" else 1) for n, r in recipes.items()} == {24}
    assert {r.seed for r in recipes.values()} == {2} and not any(r.register_as for r in recipes.values())
    assert {(r.evaluation.num_prompts, r.evaluation.num_seeds) for r in recipes.values() if r.evaluation} == {(96, 2)}
    text, unet, both = (set(recipes[name].data_of()["task"]["train"]) for name in ("textcraftor", "unet", "both"))
    assert text | unet == both == {"text_encoder", "unet"}
    direct = recipes["direct"]
    assert direct.task.kind == "direct_tuning" and direct.data.path == str(tmp_path)


def test_a_change_that_cannot_be_says_whose_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "middle", Method(changes={"task.window": {"start": 9, "stop": 5}}))
    with pytest.raises(RecipeError, match="claims: method middle: task.*start = 9 is not before stop = 5"):
        recipe_of("middle", 0, Budget(), tmp_path)


@pytest.mark.parametrize(
    ("ci95", "rule", "verdict"),
    [
        ((0.1, 0.3), "above", "holds"),
        ((-0.1, 0.3), "above", "undecided"),
        ((-0.3, -0.1), "above", "does not hold"),
        ((-0.1, 0.3), "not_below", "holds"),
        ((-0.3, -0.1), "not_below", "does not hold"),
        ((-0.3, -0.1), "told", None),
    ],
)
def test_the_interval_decides(ci95: tuple[float, float], rule: effects.Rule, verdict: effects.Verdict | None) -> None:
    assert verdict_of(Effect(sum(ci95) / 2, ci95), rule) == verdict


def test_a_claim_holds_if_all_its_parts_do() -> None:
    assert together(["holds", None, "holds"]) == "holds"
    assert together(["holds", "undecided"]) == "undecided"
    assert together(["undecided", "does not hold", "holds"]) == "does not hold"


def test_the_interval_is_over_prompts_and_seeds() -> None:
    generator = np.random.default_rng(1)
    prompts, seeds = generator.normal(0, 1, size=200), np.array([-0.6, 0.0, 0.6])
    both = crossed(1 + prompts + seeds[:, None])
    alone = crossed(np.tile(1 + prompts, (3, 1)))
    assert both.effect == pytest.approx(1 + prompts.mean())
    widths = [e.ci95[1] - e.ci95[0] for e in (both, alone)]
    assert widths[1] == pytest.approx(2 * 1.96 * prompts.std() / np.sqrt(200), rel=0.1)
    assert widths[0] > 3 * widths[1], "seeds that disagree widen it"
    gaps = np.array([[1.0, np.nan, 3.0], [1.0, 2.0, 3.0]])
    assert crossed(gaps).effect == 2
    with pytest.raises(ValueError, match="no prompt has a number in every seed"):
        crossed(np.full((2, 3), np.nan))


def test_contrasts_pair_image_with_image() -> None:
    tuned = np.array([[3.0, 5.0], [4.0, np.nan]])
    base = np.array([[1.0, np.nan], [1.0, np.nan]])
    assert contrast([(1, tuned), (-1, base)]) == pytest.approx([2.0, 3.0])
    assert np.isnan(contrast([(1, tuned), (-1, np.full((2, 2), np.nan))])).all()


def test_all_pairs_is_the_mean_over_the_batchs_prompts(tiny: Path) -> None:
    torch.manual_seed(0)
    images, prompts = torch.rand(3, 3, 32, 32), ["a small red star", "a large blue ring", "a ring"]
    matched, every = PickScore(tiny / "pick"), AllPairs(tiny / "pick")
    expected = torch.stack([matched(images, [prompt] * 3) for prompt in prompts]).mean(0)
    torch.testing.assert_close(every(images, prompts), expected)


def test_costs_are_shared_between_claims() -> None:
    rows = {row["id"]: row for row in table.costs(CLAIMS, Budget())}
    assert rows["C1"]["more"] == rows["C1"]["seconds"] and rows["C6"]["more"] == 0
    assert rows["C2"]["more"] < rows["C2"]["seconds"]
    assert sum(row["more"] for row in rows.values()) < 90 * 60


def write_images(folder: Path, gains: dict[str, float], seed: int, metric: str = "pick") -> None:
    """An evaluation of 20 prompts; images score their gain more than the base, half the first's at half its weight."""
    generator = np.random.default_rng(seed)
    images = []
    for number in range(20):
        for image in range(2):
            base = generator.normal(5, 1)
            made = {"base": base} | {name: base + gain + generator.normal(0, 0.1) for name, gain in gains.items()}
            half = base + next(iter(gains.values())) / 2 + generator.normal(0, 0.1)
            made |= {"w0.5": half} if image == 0 and number < 12 else {}
            images += [
                {"number": number, "prompt": "a", "seed": image, "variant": variant, metric: score, "feature": [1.0]}
                for variant, score in made.items()
            ]
    about = {"prompts": {"num": 20}, "num_seeds": 2, "variants": dict.fromkeys(gains), "methods": {}}
    evaluation_files.begin(folder, about)
    for part, numbers in enumerate(evaluation_files.parts(20)):
        packed = evaluation_files.pack([image for image in images if image["number"] in numbers])
        evaluation_files.write_part(folder, part, packed)


def test_the_grid_shows_where_an_encoder_is_trained_and_where_used(
    tmp_path: Path, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: dict[str, tuple[int, int]] = {}

    def make_images(recipe: Any, variants: dict[str, list[Any]], folder: Path, *_: Any) -> None:
        assert recipe.evaluation.num_prompts == 6 and recipe.evaluation.num_seeds == 1
        scored.update({name: tuned[0].steps for name, tuned in variants.items()})
        write_images(folder, {name: 0.4 if name.startswith("one") else -0.4 for name in variants}, 1, metric="clip")

    recipe = load(tiny_recipe, {"evaluation.prompts": str(tiny_recipe)})
    monkeypatch.setattr(making, "make_images", make_images)
    monkeypatch.setattr(making, "recipe_of", lambda *_: recipe)
    monkeypatch.setattr(grid, "last_of", lambda *_: (recipe, str(tmp_path)))
    budget = Budget(num_prompts=6, workers=0)
    grid.score(("one", "other"), budget, tmp_path)
    assert len(scored) == 8
    assert [scored[f"one-in-{used}"] for used in ("its-own", "0.5", "0.75", "1")] == [(2, 4), (2, 4), (1, 4), (0, 4)]
    rows = grid.measure(("one", "other"), tmp_path)
    assert [row["used"] for row in rows[:4]] == [[2, 4], [2, 4], [1, 4], [0, 4]]
    assert rows[0]["clip"]["ci95"][0] > 0.2 and rows[4]["clip"]["ci95"][1] < -0.2 and "quality" not in rows[0]
    assert grid.draw(tmp_path / "C9.png", rows).stat().st_size > 10_000
    scored.clear()
    grid.score(("one", "third"), budget, tmp_path)
    assert {name.partition("-")[0] for name in scored} == {"third"}, "what is scored is left alone"


def test_a_claim_is_judged_by_its_images(tmp_path: Path, tiny_recipe: Path) -> None:
    for seed in range(2):
        write_images(tmp_path / "images" / f"both-{seed}", {"one": 0.4, "other": 0.1}, seed)
        for name in ("one", "other"):
            run = tmp_path / f"{name}-{seed}"
            run.mkdir()
            (run / "recipe.toml").write_text(tiny_recipe.read_text())
            rate = 2.0 if name == "one" else 1.0
            lines = [{"step": s, "images_per_second": rate} for s in range(1, 25)]
            (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    parts = (
        Part("one − other", "pick", {"one": 1, "other": -1}),
        Part("other − one", "pick", {"other": 1, "one": -1}, "told"),
        Part("half − base", "pick", {"one:w0.5": 1, "one:base": -1}),
        Part("quality", "quality", {"one": 1, "one:base": -1}),
    )
    claim = Claim("One beats the other", parts, curves=("one", "other"), curve_of="pick")
    found = judging.judge("C1", claim, Budget(num_seeds=2), tmp_path)
    assert found["verdict"] == "holds" and found["left_out"] == ["quality"]
    assert found["effect"] == pytest.approx(0.3, abs=0.05) and found["ci95"][0] > 0.2
    half = found["parts"][2]
    assert half["effect"] == pytest.approx(0.2, abs=0.05) and half["verdict"] == "holds"
    # 24 steps of two and of four seconds: the first gains in a quarter of them what the other does in all.
    quick, slow = (found["time_to_reward"][name] for name in ("one", "other"))
    assert (slow["samples"], slow["seconds"]) == (96, 96) and slow["level"] == quick["level"]
    assert quick["samples"] == pytest.approx(24, rel=0.4) and quick["seconds"] == pytest.approx(quick["samples"] / 2)
    assert (tmp_path / "C1.png").stat().st_size > 10_000
    told = judging.judge("C2", Claim("Quality", parts[3:]), Budget(num_seeds=2), tmp_path)
    assert told["verdict"] == "undecided" and told["reason"] == "not measured here: quality"
    lines = table.markdown({"claims": [found, told]}).splitlines()
    assert lines[2].startswith("| C1 One beats the other | one − other: +0.") and "**holds**" in lines[2]
    assert "**undecided**: not measured here: quality" in lines[3] and "craftor claims --only C2" in lines[3]


PARTS = (
    Part("half − base, total", "total", {"half": 1, "one:base": -1}, "not_below"),
    Part("half − one, total", "total", {"half": 1, "one": -1}, "told"),
    Part("half − base, accuracy", "accuracy", {"half": 1, "one:base": -1}),
    Part("one, half weight − base, clip", "clip", {"one:w0.5": 1, "one:base": -1}, "told"),
)


@pytest.fixture
def small(tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Budget]:
    """Two methods on the tiny models, three sets of images, one claim that can be tested and one that cannot."""
    prompts = tmp_path / "held_out.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{n} red stars"}) + "\n" for n in range(6)))
    with tiny_recipe.open("a") as file:
        file.write(f'\n[evaluation]\nprompts = "{prompts}"\n')
    methods = {
        "one": Method(),
        "other": Method(changes={"task.window.null": "original"}),
        "absent": Method("none.toml"),
    }
    images = {
        "one": Images(("one",), num_strips=6),
        "other": Images(("other",)),
        "half": Images(("one", "other"), (0.5, 0.5), use_from=0.25),
        "absent": Images(("absent",)),
    }
    claims = {
        "C1": Claim("Half is no worse", PARTS, curves=("one", "other"), curve_of="pick", strips="one"),
        "C2": Claim("The absent one is better", (Part("absent", "total", {"absent": 1}),)),
    }
    for owner, name, stand_in in (
        ("craftor.claims.methods", "METHODS", methods),
        ("craftor.claims.methods", "IMAGES", images),
        ("craftor.claims.testing", "METHODS", methods),
        ("craftor.claims.testing", "IMAGES", images),
        ("craftor.claims.making", "IMAGES", images),
        ("craftor.claims.making", "SCORED_BY", "one"),
        ("craftor.claims.testing", "SCORED_BY", "one"),
        ("craftor.claims.testing", "CLAIMS", claims),
    ):
        monkeypatch.setattr(f"{owner}.{name}", stand_in)
    yield Budget(2, 4, num_seeds=2, num_prompts=6, num_images=2, workers=0, reference=str(tiny_recipe))


@pytest.mark.ray
def test_claims_are_tested_once(cluster: None, small: Budget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after the second run, and started again: nothing is trained twice."""
    out = tmp_path / "claims"
    trained: list[str] = []
    real = making.train

    def train(recipe: Any, source: Path, folder: Path) -> Any:
        if len(trained) == 2:
            trained.append("stop")
            raise KeyboardInterrupt
        trained.append(folder.name)
        return real(recipe, source, folder)

    monkeypatch.setattr(making, "train", train)
    with pytest.raises(KeyboardInterrupt):
        testing.test(testing.select(None), small, out)
    found = testing.test(testing.select(None), small, out)
    assert trained == ["one-0", "other-0", "stop", "one-1", "other-1"]
    first, second = found["claims"]
    assert first["id"] == "C1" and first["verdict"] in ("holds", "undecided", "does not hold")
    assert first["ci95"][0] <= first["effect"] <= first["ci95"][1] and first["command"] == "craftor claims --only C1"
    assert [part["verdict"] for part in first["parts"]][1:] == [None, None]
    assert first["left_out"] == ["half − base, accuracy"], "no referee for these images"
    assert second["verdict"] == "undecided" and "no recipe none.toml" in second["reason"]
    assert (out / "C1.png").stat().st_size > 10_000
    assert all(row is None or 0 < row["samples"] <= 8 for row in first["time_to_reward"].values())
    assert making.find_images("one-at-1", 0, out), "a checkpoint between has been scored"
    assert len(list((out / "images").iterdir())) == 4, "of each seed, the images together, and those of checkpoints"
    lines = table.markdown(found).splitlines()
    assert len(lines) == 4 and f"**{first['verdict']}**" in lines[2] and "**undecided**: claims: method" in lines[3]
    assert json.loads(json.dumps(found)) == found | {"claims": json.loads(json.dumps(found["claims"]))}
    with pytest.raises(ClaimsError, match="another budget: num_steps was 2, is 3; choose another --out"):
        testing.test(testing.select(None), replace(small, num_steps=3), out)


def test_a_curve_counts_images_and_a_method_that_gains_nothing_reaches_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two prompts sampled six times each, at three images a second: four seconds a step."""
    recipe = SimpleNamespace(run=SimpleNamespace(batch_size=2), task=SimpleNamespace(samples_per_prompt=6))
    monkeypatch.setattr(curves, "load_run", lambda run: recipe)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"images_per_second": 3.0}) + "\n")
    gaining, losing = (curves.curve([tmp_path], [5, 10], np.array([scores])) for scores in ([1, 2, 4], [1, 0.5, 0.8]))
    assert gaining[0].tolist() == [0, 60, 120] and gaining[1].tolist() == [0, 20, 40]
    found = curves.time_to_reward({"gaining": gaining, "slow": (*gaining[:2], np.array([1, 2, 3])), "losing": losing})
    assert found["losing"] is None and found["slow"] == {"level": 3, "samples": 120, "seconds": 40}
    assert found["gaining"] == {"level": 3, "samples": 90, "seconds": 30}


def test_the_readme_says_what_was_found() -> None:
    root = Path(__file__).parents[1]
    found = json.loads((root / "recipes" / "claims.json").read_text())
    assert [row["id"] for row in found["claims"]] == list(CLAIMS)
    assert table.markdown(found) in (root / "README.md").read_text()


def test_unknown_claims_are_refused() -> None:
    with pytest.raises(ClaimsError, match="claim C11: unknown; allowed: C1, C2, C3"):
        testing.select(["C1", "C11"])
