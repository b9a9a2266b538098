"""Several rewards, one gradient: presets, running scales, equal shares, conflicts; what is reported and what stays."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from craftor import checkpoint, job, objective, watch
from craftor.composition import Composition, cosines, pcgrad, shares
from craftor.guards import Guards
from craftor.recipe import RecipeError, load
from craftor.reward_settings import Composition as Settings
from craftor.run_files import METRICS
from craftor.scoring import Scoring
from craftor.task_settings import DirectTuning

PROMPTS = ["a small red star", "a large blue ring", "a large red ring"]
QUIET = Guards(rules=(), sharpness_every=0)


class Redness:
    differentiable, needs_prompt = True, False
    calls = 0

    def __init__(self, weights: str) -> None:
        self.sign = -1.0 if weights == "less" else 1.0

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        type(self).calls += 1
        return self.sign * (images[:, 0] ** 2 - images[:, 1:].mean(1)).mean((1, 2))


def scoring(tiny: Path, composition: dict | None = None, guards: Guards = QUIET, **rewards: dict) -> Scoring:
    settings = {
        "clip": {"kind": "clip_score", "weights": f"{tiny}/clip", "weight": 22.0},
        "pick": {"kind": "pick_score", "weights": f"{tiny}/pick", "weight": 0.7},
        "redness": {"kind": f"{__name__}:Redness", "weights": "more", "weight": 0.3},
        **rewards,
    }
    task = DirectTuning(kind="direct_tuning", rewards=settings, composition=composition or {})
    return Scoring(task, guards, torch.device("cpu"), {})


def pictures(seed: int = 0, number: int = 3) -> Tensor:
    return torch.rand(number, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("share", [1.0, 1 / 3])
def test_without_options_the_gradient_has_the_bits_of_rewards_backpropagated_one_by_one(
    tiny: Path, share: float
) -> None:
    found = scoring(tiny)
    leaf = pictures().requires_grad_()
    for name, reward in found.rewards.items():
        (share * objective.loss(reward(leaf, PROMPTS), found.weights[name])).backward()
    metrics, gradient = found(pictures(), PROMPTS, share)
    assert leaf.grad is not None and torch.equal(gradient, leaf.grad)
    assert torch.equal(found.total(metrics), objective.total(metrics, found.weights))


def test_prompts_that_a_reward_cuts_are_counted(tiny: Path) -> None:
    prompts = [PROMPTS[0], "a ring" + " above a ring" * 12, PROMPTS[1]]
    assert scoring(tiny)(pictures(), prompts, 1.0)[0]["truncated"].tolist() == [0, 1, 0]


def test_scale_multiplies_the_weight(tiny: Path) -> None:
    scaled = scoring(tiny, redness={"kind": f"{__name__}:Redness", "weights": "more", "weight": 0.5, "scale": 0.6})
    assert scaled.weights == scoring(tiny).weights
    assert torch.equal(scaled(pictures(), PROMPTS, 1.0)[1], scoring(tiny)(pictures(), PROMPTS, 1.0)[1])


@pytest.mark.parametrize(
    ("preset", "weights"),
    [("paper_text", [100, 1, 1, 100]), ("script", [50, 3, 1, 100]), ("table6", [100, 3, 1, 100])],
)
def test_presets_are_the_papers_four_rewards(tiny_recipe: Path, preset: str, weights: list[float]) -> None:
    recipe = load(tiny_recipe, {"task.rewards": {"preset": preset}})
    rewards = recipe.task.rewards
    public = ["clip-vit-g-14", "laion-aesthetic-v2", "pick-score-v1", "hps-v2"]
    assert [reward.weights for reward in rewards.values()] == public
    assert [reward.factor for reward in rewards.values()] == weights
    assert type(recipe).model_validate(recipe.model_dump(by_alias=True)) == recipe


def test_a_preset_can_be_changed_and_added_to(tiny_recipe: Path) -> None:
    held_out = {"kind": "image_reward", "weights": "image-reward-v1", "evaluation_only": True}
    changed = {"preset": "script", "clip": {"weight": 60.0}, "judge": held_out}
    rewards = load(tiny_recipe, {"task.rewards": changed}).task.rewards
    assert list(rewards) == ["clip", "aesthetic", "pick", "hps", "judge"]
    assert (rewards["clip"].kind, rewards["clip"].weight, rewards["aesthetic"].weight) == ("clip_score", 60.0, 3.0)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("task.rewards", {"preset": "paper"}, "preset is 'paper'; allowed: paper_text, script, table6"),
        ("task.rewards", {"preset": "script", "clip": {"wieght": 1.0}}, "task.rewards.clip.wieght: unknown key"),
        ("task.rewards.dark", {"kind": "aesthetic", "weights": "x", "weight": 1.0}, "which is another metric's name"),
        ("task.rewards.pick.scale", 0.0, "task.rewards.pick.scale: Input should be greater than 0"),
        ("task.rewards.pick.every", 2, "every = 2 goes with evaluation_only = true"),
        ("task.composition.conflicts", "drop", "Input should be 'sum' or 'pcgrad'"),
        ("task.composition", {"normalise": True, "weights": "equal_shares"}, 'goes with weights = "given"'),
    ],
)
def test_mistakes_are_explained(tiny_recipe: Path, key: str, value: object, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        load(tiny_recipe, {key: value})
    assert message in str(error.value)


def test_cosines_and_shares_are_those_of_gradients_taken_apart(tiny: Path) -> None:
    found = scoring(tiny)
    metrics, _ = found(pictures(), PROMPTS, 0.5)
    apart = {}
    for name, reward in found.rewards.items():
        leaf = pictures().requires_grad_()
        (apart[name],) = torch.autograd.grad(found.weights[name] * reward(leaf, PROMPTS).sum(), leaf)
    rows = {name: gradient.flatten(1) for name, gradient in apart.items()}
    product = (rows["clip"] * rows["pick"]).sum(1) / (rows["clip"].norm(dim=1) * rows["pick"].norm(dim=1))
    torch.testing.assert_close(metrics["cosine/clip/pick"], product, rtol=1e-4, atol=1e-6)
    whole = sum(row.norm(dim=1) for row in rows.values())
    torch.testing.assert_close(metrics["share/pick"], rows["pick"].norm(dim=1) / whole)
    assert {"cosine/clip/redness", "cosine/pick/redness", "share/clip", "share/redness"} <= metrics.keys()


def test_reports_cost_no_call_and_keep_to_their_interval(tiny: Path) -> None:
    found, before = scoring(tiny, {"report_every": 3}), Redness.calls
    reported = ["share/clip" in found(pictures(), PROMPTS, 1.0, step)[0] for step in range(4)]
    assert reported == [True, False, False, True]
    assert Redness.calls == before + 4


def test_opposite_and_equal_rewards_have_cosines_of_one() -> None:
    gradient = pictures()
    assert cosines({"a": gradient, "b": -2 * gradient})["cosine/a/b"].tolist() == pytest.approx([-1.0] * 3)
    assert cosines({"a": gradient, "b": 3 * gradient})["cosine/a/b"].tolist() == pytest.approx([1.0] * 3)
    assert cosines({"a": gradient, "b": 0 * gradient})["cosine/a/b"].tolist() == [0.0] * 3
    assert shares({"a": gradient, "b": -3 * gradient})["share/b"].tolist() == pytest.approx([0.75] * 3)


def image(*values: float) -> Tensor:
    """One image a row: its first colour values, the rest black."""
    return torch.tensor(values).view(1, 1, 1, -1).expand(1, 3, 1, -1).clone()


def test_pcgrad_drops_what_conflicts_image_by_image() -> None:
    first = torch.cat([image(1.0, 0.0), image(1.0, 0.0)])
    second = torch.cat([image(-1.0, 1.0), image(1.0, 1.0)])  # the first image conflicts, the second does not
    # <g1, g2> = -1 for each colour: g1 + 1/2 g2 = (.5, .5), g2 + g1 = (0, 1).
    expected = torch.cat([image(0.5, 1.5), image(2.0, 1.0)])
    torch.testing.assert_close(pcgrad({"a": first, "b": second}), expected)


def test_pcgrad_without_conflict_is_the_sum_and_with_it_harms_no_reward(tiny: Path) -> None:
    gradients = {"a": pictures(1) - 0.5, "b": pictures(2) - 0.6}
    gradients["b"] -= 0.8 * gradients["a"]  # conflicts in every image
    summed, projected = gradients["a"] + gradients["b"], pcgrad(gradients)
    products = [(own * projected).sum((1, 2, 3)) for own in gradients.values()]
    assert all((product >= -1e-3).all() for product in products)
    assert (gradients["a"] * summed).sum() < (gradients["a"] * projected).sum()
    agreeing = {"a": pictures(1), "b": pictures(2)}
    assert torch.equal(pcgrad(agreeing), agreeing["a"] + agreeing["b"])


def test_pcgrad_in_a_recipe(tiny: Path) -> None:
    less = {"kind": f"{__name__}:Redness", "weights": "less", "weight": 0.3}
    plain, projected = scoring(tiny, less=less), scoring(tiny, {"conflicts": "pcgrad"}, less=less)
    (_, summed), (_, without) = plain(pictures(), PROMPTS, 1.0), projected(pictures(), PROMPTS, 1.0)
    assert not torch.allclose(summed, without)


def batch(found: Scoring, seed: int = 0) -> dict[str, Tensor]:
    return found(pictures(seed), PROMPTS, 1.0)[0]


def test_normalised_scores_have_mean_zero_and_the_spread_of_their_weight(tiny: Path) -> None:
    found = scoring(tiny, {"normalise": True})
    assert found.composition.needs_start
    found.composition.observe(batch(found))
    assert not found.composition.needs_start
    metrics, gradient = found(pictures(), PROMPTS, 1.0)
    total = {name: found.composition.factors()[name] * metrics[name] for name in found.weights}
    for name, values in total.items():
        assert values.std(unbiased=False).item() == pytest.approx(found.weights[name], rel=1e-2), name
    assert found.total(metrics).mean().item() == pytest.approx(0.0, abs=1e-3)
    leaf = pictures().requires_grad_()
    found.total({name: reward(leaf, PROMPTS) for name, reward in found.rewards.items()}).mean().backward()
    torch.testing.assert_close(gradient, -leaf.grad, rtol=1e-3, atol=3e-6)


def test_a_constant_score_is_not_blown_up() -> None:
    composition = Composition(Settings(normalise=True), {"a": 1.0})
    composition.observe({"a": torch.full((4,), 20.0)})
    assert composition.factors()["a"] == pytest.approx(1 / 0.02)


def test_running_means_move_by_the_smoothing() -> None:
    composition = Composition(Settings(normalise=True, smoothing=0.75), {"a": 2.0})
    for scores in ([1.0, 3.0], [5.0, 7.0]):
        used = composition.observe({"a": torch.tensor(scores)})
    mean, square = 0.75 * 2 + 0.25 * 6, 0.75 * 5 + 0.25 * 37
    assert used == {"factor/a": pytest.approx(2.0)}  # the second batch was scored by what the first showed
    assert composition.factors()["a"] == pytest.approx(2 / (square - mean**2) ** 0.5)


def test_statistics_depend_on_the_whole_batch_alone(tiny: Path) -> None:
    """Two workers' slices, gathered, move them as one worker's batch does; a micro-batch's share changes no norm."""
    whole, halves = (scoring(tiny, {"weights": "equal_shares"}) for _ in range(2))
    images, prompts = pictures(number=4), [*PROMPTS, "a small blue star"]
    together = whole(images, prompts, 1.0)[0]
    parts = [halves(images[part], prompts[part], 0.5)[0] for part in (slice(0, 2), slice(2, 4))]
    whole.composition.observe(together)
    halves.composition.observe({name: torch.cat([part[name] for part in parts]) for name in together})
    assert halves.composition.state() == pytest.approx(whole.composition.state(), rel=1e-4)


def test_equal_shares_make_gradients_equally_long(tiny: Path) -> None:
    found = scoring(tiny, {"weights": "equal_shares"})
    given = batch(found)
    assert max(given[f"share/{name}"].mean().item() for name in found.weights) > 0.5
    found.composition.observe(given)
    metrics = batch(found)
    factors = found.composition.factors()
    lengths = {name: factors[name] * metrics[f"norm/{name}"].mean().item() for name in factors}
    assert list(lengths.values()) == pytest.approx([lengths["clip"]] * 3, rel=1e-4)
    together = sum(found.weights[name] * given[f"norm/{name}"].mean().item() for name in factors)
    assert sum(lengths.values()) == pytest.approx(together, rel=1e-4)


def test_state_round_trips_through_json_bit_for_bit(tiny: Path) -> None:
    found = scoring(tiny, {"weights": "equal_shares"})
    for seed in range(3):
        found.composition.observe(batch(found, seed))
    restored = scoring(tiny, {"weights": "equal_shares"})
    restored.composition.restore(json.loads(json.dumps(found.composition.state())))
    assert torch.equal(found(pictures(9), PROMPTS, 1.0)[1], restored(pictures(9), PROMPTS, 1.0)[1])


def test_a_reward_without_gradient_cannot_train(tiny: Path) -> None:
    with pytest.raises(ValueError, match="task.rewards.size: not differentiable"):
        scoring(tiny, size={"kind": "compressibility", "weights": "jpeg", "weight": 1.0})


def test_settings_refuse_what_they_do_not_know() -> None:
    with pytest.raises(ValidationError, match="smoothing"):
        Settings(smoothing=1.0)


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
def test_a_guarded_and_normalised_run_rolls_back_and_resumes_to_the_same_bits(
    tiny_recipe: Path, tmp_path: Path
) -> None:
    """The learning rate, which warms up, stands for a metric that moves: 1/8 of it more every step."""
    rules = [
        {"metric": "lr", "above": 2e-4, "patience": 1, "over": 1},
        {"metric": "lr", "above": 5.5e-4, "patience": 2, "over": 1, "action": "roll_back"},
    ]
    changes = {
        "task.composition": {"normalise": True, "conflicts": "pcgrad"},
        "guards": {"rules": rules, "sharpness_every": 2},
        "optimizer.warmup_steps": 8,
        "run.checkpoint_every": 2,
    }
    whole, again = tmp_path / "runs" / "whole", tmp_path / "runs" / "again"
    trained = job.train(load(tiny_recipe, changes), tiny_recipe, whole)
    names = [path.name for path in sorted((whole / "checkpoints").iterdir())]
    assert names == ["discarded-step-000006", "step-000002", "step-000004"]
    assert trained.checkpoint == whole / "checkpoints" / "step-000004"
    said = watch.read(whole)
    assert [(v["step"], v["action"], v["last_good_step"]) for v in said] == [(2, "warn", 1), (6, "roll_back", 4)]
    assert all((whole / v["pictures"]).is_file() for v in said)
    records = lines(whole)
    assert [("sharpness" in r, r["step"]) for r in records] == [(s % 2 == 1, s) for s in range(1, 7)]
    assert {"cosine/clip/pick", "share/clip", "factor/clip", "dark", "diversity"} <= records[-1].keys()

    # As a kill after step 6, before its verdict was written, would leave the folder.
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints" / "discarded-step-000006")
    (again / watch.GUARD).write_text(json.dumps(said[:1]))
    job.resume(again)
    assert watch.read(again) == said
    timeless = [{k: v for k, v in record.items() if k != "images_per_second"} for record in records]
    assert [{k: v for k, v in r.items() if k != "images_per_second"} for r in lines(again)] == timeless
    found, expected = (out / "checkpoints" / "discarded-step-000006" / "trainer" for out in (again, whole))
    assert (found / "state.json").read_text() == (expected / "state.json").read_text()
    weights = load_file(expected / "module.safetensors")
    assert all(torch.equal(v, weights[name]) for name, v in load_file(found / "module.safetensors").items())
    assert checkpoint.latest(again) == again / "checkpoints" / "step-000004"


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
