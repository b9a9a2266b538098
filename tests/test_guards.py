"""Guards: what images show without a model, what a history of metrics leads to, and that it comes before the harm."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from craftor import checkpoint, seeds, storage, watch
from craftor.decode import decode
from craftor.denoise import Prompt, State, sample
from craftor.embed import embed
from craftor.fit import TrainingStopped, fit
from craftor.guards import DEFAULTS, Guards, Rule, verdict
from craftor.image_statistics import colour_entropy, dark, edge_density, measure, summarise
from craftor.locate import locate, shipped_recipe
from craftor.recipe import Recipe, RecipeError, load
from craftor.run_files import METRICS
from craftor.scoring import Scoring
from craftor.stream import Rows
from craftor.task_settings import DirectTuning
from craftor.tasks.reward_tuning import RewardTuningTask
from craftor_micro.captions import Description
from craftor_micro.referee import Referee


def history(name: str, *values: float, every: int = 1) -> list[dict]:
    """Lines of `metrics.jsonl`; the metric is in every `every`-th, from the first on."""
    steps = range(1, (len(values) - 1) * every + 2)
    return [
        {"step": s, "loss": 0.0} | ({name: values[(s - 1) // every]} if s % every == 1 % every else {}) for s in steps
    ]


def first(rule: Rule, lines: Sequence[dict]) -> tuple[int, int] | None:
    """The step at which a rule first acts, and the step before it was first broken."""
    found = (verdict([rule], lines[: i + 1]) for i in range(len(lines)))
    return next(((v.step, v.last_good_step) for v in found if v), None)


@pytest.mark.parametrize(
    ("bound", "values", "expected"),
    [
        ({"below": 0.6, "of": "start"}, [10, 10, 7, 5, 5, 5], (6, 3)),  # three readings below 6
        ({"below": 0.6, "of": "start"}, [10, 10, 5, 5, 7, 5, 5], None),  # never three in a row
        ({"below": 0.6, "of": "start"}, [10, 30, 30, 30, 10, 10, 10], None),
        ({"below": 0.6, "of": "best"}, [10, 30, 30, 30, 10, 10, 10], (7, 4)),
        ({"above": 2.0, "of": "start"}, [1, 1.9, 2.1, 2.1, 2.1], (5, 2)),
        ({"above": 2.0, "of": "best"}, [4, 4, 1, 3, 3, 3], (6, 3)),
        ({"above": 0.5}, [0.9, 0.4, 0.6, 0.6, 0.6], (5, 2)),
        ({"below": 0.5}, [0.9, 0.4, 0.4, 0.4, 0.6], (4, 1)),
        ({"below": 0.9, "of": "start"}, [-10, -10, -12, -12, -12], (5, 2)),  # 10 % of 10 below -10
        ({"above": 0.5}, [0.9], None),
        ({"above": 0.5}, [], None),
    ],
)
def test_a_rule_acts_after_its_patience(bound: dict, values: list[float], expected: tuple[int, int] | None) -> None:
    assert first(Rule(metric="m", over=1, patience=3, **bound), history("m", *values)) == expected


def test_readings_are_averaged_and_the_start_is_an_average() -> None:
    noisy = [8, 12, 9, 11, 1, 19, 10, 10]  # pairs: 10, 10.5, 10, 6, 10, 14.5, 10
    rule = Rule(metric="m", below=0.6, of="start", over=2, patience=1)
    assert first(rule, history("m", *noisy)) is None
    assert first(rule, history("m", *noisy, 1)) == (9, 8)


def test_a_metric_taken_at_intervals_is_judged_when_it_is_there() -> None:
    rule = Rule(metric="m", above=4.0, of="start", over=1, patience=2)
    lines = history("m", 1, 1, 5, 5, every=10)
    assert [r["step"] for r in lines if "m" in r] == [1, 11, 21, 31]
    assert first(rule, lines) == (31, 20)
    assert verdict([rule], [*lines, {"step": 32, "loss": 0.0}]) is None
    assert verdict([Rule(metric="never", above=0.0)], lines) is None


def test_a_warning_comes_once_and_an_end_until_it_is_heeded() -> None:
    lines = history("m", 0, 0, 1, 1, 1, 0, 1, 1)
    acted = {
        action: [i + 1 for i in range(len(lines)) if verdict([rule], lines[: i + 1])]
        for action in ("warn", "stop")
        for rule in [Rule(metric="m", above=0.5, over=1, patience=2, action=action)]
    }
    assert acted == {"warn": [4, 8], "stop": [4, 5, 8]}


def test_the_gravest_verdict_counts_and_names_metric_values_and_steps() -> None:
    lines = history("m", 10, 10, 4, 4)
    rules = [
        Rule(metric="m", below=0.5, of="start", over=1, patience=1, action=a) for a in ("warn", "roll_back", "stop")
    ]
    found = verdict(rules, lines)
    assert found is not None and found.action == "roll_back"
    assert found.reason == "m is 4, below 5 (0.5 of its start), since step 3"
    assert found.last_good_step == 2


def test_the_default_rules_let_a_steady_run_pass_and_see_a_collapse() -> None:
    names = {rule.metric for rule in DEFAULTS}
    steady = [{"step": s, **{name: 0.3 + 0.05 * (s % 3) for name in names}} for s in range(1, 60)]
    assert all(verdict(DEFAULTS, steady[:i]) is None for i in range(1, 60))
    for metric, value in [("colour_entropy", 0.1), ("edge_density", 0.9), ("edge_density", 0.1), ("diversity", 0.1)]:
        changed = [*steady[:30], *({**record, metric: value} for record in steady[30:])]
        assert any((v := verdict(DEFAULTS, changed[:i])) and v.metric == metric for i in range(31, 45)), metric


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "guards.rules",
            [{"metric": "colour_entrpy", "below": 1.0}],
            "no metric 'colour_entrpy'; there are clip, pick",
        ),
        ("guards.rules", [{"metric": "dark"}], "below is None and above is None; give one of them"),
        ("guards.rules", [{"metric": "dark", "below": 0.1, "above": 0.2}], "give one of them"),
        ("guards.rules", [{"metric": "dark", "above": 0.1, "action": "halt"}], "'warn', 'stop' or 'roll_back'"),
        ("guards.rules", [{"metric": "share/pikc", "above": 0.1}], "no metric 'share/pikc'"),
        ("guards.sharpnes_every", 3, "guards.sharpnes_every: unknown key; allowed here: rules, sharpness_every"),
    ],
)
def test_mistakes_are_explained(tiny_recipe: Path, key: str, value: object, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        load(tiny_recipe, {key: value})
    assert message in str(error.value)


def test_a_held_out_reward_needs_to_be_scored_to_be_a_guard(tiny_recipe: Path, tiny: Path) -> None:
    judge = {"kind": "pick_score", "weights": f"{tiny}/pick", "evaluation_only": True}
    rule = {"guards.rules": [{"metric": "judge", "below": 0.97, "of": "best"}]}
    with pytest.raises(RecipeError, match="it is scored in evaluation only: give it `every`"):
        load(tiny_recipe, {"task.rewards.judge": judge, **rule})
    load(tiny_recipe, {"task.rewards.judge": {**judge, "every": 5}, **rule})


def flat(value: float, number: int = 1) -> Tensor:
    return torch.full((number, 3, 16, 16), value)


def test_statistics_of_images_whose_answer_is_known() -> None:
    checks = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat(8, 8).expand(1, 3, 16, 16)
    half = torch.cat([flat(0.0)[..., :8], flat(1.0)[..., :8]], dim=3)
    every_colour = torch.stack(torch.meshgrid(*[(torch.arange(8) + 0.5) / 8] * 3, indexing="ij")).view(1, 3, 16, 32)
    images = torch.cat([flat(0.0), flat(0.5), checks, half])
    assert dark(images).tolist() == [1.0, 0.0, 0.5, 0.5]
    assert edge_density(images).tolist() == pytest.approx([0.0, 0.0, 1.0, 1 / 15])
    assert colour_entropy(images).tolist() == pytest.approx([0.0, 0.0, 1.0, 1.0])
    assert colour_entropy(every_colour).item() == pytest.approx(9.0)
    assert measure(images, ["a"] * 4)["saturated"].tolist() == [1.0, 0.0, 1.0, 1.0]


def test_diversity_is_over_the_batch_and_within_prompts() -> None:
    images = torch.cat([flat(0.0), flat(0.0), flat(1.0), flat(0.5)])
    found = summarise(measure(images, ["a", "a", "b", "b"]))
    assert found["prompt_diversity"] == pytest.approx((0 + 0.5) / 2)
    assert found["diversity"] == pytest.approx((0 + 1 + 0.5 + 1 + 0.5 + 0.5) / 6)
    assert "prompt_diversity" not in summarise(measure(images, ["a", "b", "c", "d"]))
    assert "diversity" not in summarise(measure(images[:1], ["a"]))


def test_diversity_sees_the_batch_whole_however_it_was_cut() -> None:
    images, prompts = torch.rand(6, 3, 32, 32), ["a", "b", "a", "c", "b", "a"]
    parts = [measure(images[i : i + 2], prompts[i : i + 2]) for i in (0, 2, 4)]
    together = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    assert summarise(together) == pytest.approx(summarise(measure(images, prompts)))


class Linear:
    """A reward whose sharpness is known: the sum of the pixels times fixed slopes."""

    differentiable, needs_prompt = True, False
    calls = 0

    def __init__(self, weights: str) -> None:
        self.slopes = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(int(weights)))

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        type(self).calls += 1
        return (images * self.slopes).sum((1, 2, 3))


def linear(tiny: Path, guards: Guards, **rewards: dict) -> Scoring:
    settings = {
        "clip": {"kind": "clip_score", "weights": f"{tiny}/clip", "weight": 1e-6},
        "line": {"kind": f"{__name__}:Linear", "weights": "1", "weight": 2.0},
        **rewards,
    }
    return Scoring(DirectTuning(kind="direct_tuning", rewards=settings), guards, torch.device("cpu"), {})


def test_sharpness_of_a_linear_reward_is_its_slope(tiny: Path) -> None:
    """The worst change of root mean square r of n pixels loses weight * r * sqrt(n) * |slopes|."""
    images, slopes = 0.4 + 0.2 * torch.rand(2, 3, 32, 32), Linear("1").slopes
    found = linear(tiny, Guards(sharpness_radius=0.005))(images, ["a dog"] * 2, 0.5)[0]["sharpness"]
    expected = 2.0 * 0.005 * slopes.numel() ** 0.5 * slopes.norm().item()
    assert found.tolist() == pytest.approx([expected] * 2, rel=1e-3)


def test_sharpness_and_held_out_rewards_are_scored_when_they_are_due(tiny: Path) -> None:
    judge = {"kind": f"{__name__}:Linear", "weights": "2", "evaluation_only": True, "every": 2}
    ignored = {"kind": "clip_score", "weights": "nowhere", "evaluation_only": True}
    found, images = linear(tiny, Guards(sharpness_every=3), judge=judge, ignored=ignored), torch.rand(2, 3, 32, 32)
    steps = [found(images, ["a dog"] * 2, 1.0, step) for step in range(4)]
    assert [("judge" in metrics, "sharpness" in metrics) for metrics, _ in steps] == [
        (True, True),
        (False, False),
        (True, False),
        (False, True),
    ]
    assert all(torch.equal(gradient, steps[0][1]) for _, gradient in steps)
    torch.testing.assert_close(steps[0][0]["judge"], Linear("2")(images, []))


def test_verdicts_are_kept_with_pictures_and_said_again_when_steps_are(tmp_path: Path) -> None:
    rules = [Rule(metric="m", above=0.5, over=1, patience=a, action=b) for a, b in ((1, "warn"), (2, "stop"))]
    (tmp_path / METRICS).write_text('{"step": 1, "m": 0}\n')

    def go_on(step: int) -> list[bool]:
        guard = watch.Watch(rules, tmp_path, tmp_path / METRICS, step)
        return [guard.ends({"step": s, "m": 1.0}, flat(0.5, 3)) for s in (2, 3)]

    assert go_on(1) == [False, True]
    said = watch.read(tmp_path)
    assert [(v["step"], v["action"]) for v in said] == [(2, "warn"), (3, "stop")]
    assert (tmp_path / "samples" / "guard-step-000003.png").stat().st_size > 0
    assert watch.ended(tmp_path) == said[1]
    assert go_on(1) == [False, True]
    assert watch.read(tmp_path) == said


def checkpoints(run_dir: Path, *steps: int) -> None:
    for step in steps:
        folder = run_dir / "checkpoints" / f"step-{step:06d}" / "trainer"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({"step": step}))
        (folder.parent / checkpoint.MANIFEST).write_text("{}")


def conclude(run_dir: Path, recipe: Path, action: str, url: str | None = None) -> Path:
    """What `fit` makes of a run that a guard has ended at step 30, without training."""
    verdict = {"step": 30, "metric": "m", "action": action, "reason": "m is 4, below 5", "last_good_step": 25}
    (run_dir / watch.GUARD).write_text(json.dumps([{**verdict, "pictures": None}]))
    return fit(load(recipe, {"run.storage": url} if url else None), run_dir, run_dir / "rows", 1)


def test_stop_fails_the_run_and_keeps_every_checkpoint(tiny_recipe: Path, tmp_path: Path) -> None:
    checkpoints(tmp_path, 10, 20, 30)
    for _ in range(2):  # resuming changes nothing
        with pytest.raises(TrainingStopped, match=r"a guard stopped the run at step 30: m is 4, below 5; its check"):
            conclude(tmp_path, tiny_recipe, "stop")
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoints" / "step-000030"


def test_roll_back_ends_with_the_last_good_checkpoint(tiny_recipe: Path, tmp_path: Path) -> None:
    checkpoints(tmp_path, 10, 20, 30)
    for _ in range(2):
        assert conclude(tmp_path, tiny_recipe, "roll_back") == tmp_path / "checkpoints" / "step-000020"
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoints" / "step-000020"
    assert (tmp_path / "checkpoints" / "discarded-step-000030").is_dir()


def test_roll_back_without_a_good_checkpoint_is_a_failure(tiny_recipe: Path, tmp_path: Path) -> None:
    checkpoints(tmp_path, 30)
    with pytest.raises(TrainingStopped, match="no checkpoint of step 25 or before; allowed: a smaller run.checkpoint"):
        conclude(tmp_path, tiny_recipe, "roll_back")


@pytest.fixture
def home(tmp_path: Path, tiny_recipe: Path) -> str:
    """Of a run with checkpoints of steps 10, 20 and 30; its folder, `tmp_path / "run"`, has the last one."""
    made, url = tmp_path / "made", (tmp_path / "home").as_uri()
    checkpoints(made, 10, 20, 30)
    (made / "recipe.toml").write_text(tiny_recipe.read_text())
    for folder in checkpoint.complete_ones(made):
        storage.put_checkpoint(folder, url)
    (tmp_path / "run").mkdir()
    storage.put_run(made, url)
    storage.get_run(url, tmp_path / "run")
    return url


def test_roll_back_finds_the_last_good_checkpoint_at_the_runs_home(
    tiny_recipe: Path, tmp_path: Path, home: str
) -> None:
    run_dir = tmp_path / "run"
    assert conclude(run_dir, tiny_recipe, "roll_back", home) == run_dir / "checkpoints" / "step-000020"
    storage.get_run(home, tmp_path / "elsewhere")
    assert checkpoint.latest(tmp_path / "elsewhere") == tmp_path / "elsewhere" / "checkpoints" / "step-000020"


def test_a_stopped_run_trains_on_when_its_home_is_changed_as_told(tiny_recipe: Path, tmp_path: Path, home: str) -> None:
    run_dir = tmp_path / "run"
    with pytest.raises(TrainingStopped) as stopped:
        conclude(run_dir, tiny_recipe, "stop", home)
    storage.put_run(run_dir, home)
    told = re.search(r"change \[guards\] in (\S+), remove (\S+) and (\S+), and resume", str(stopped.value))
    assert told is not None and told[1] == f"{home}/recipe.toml"
    for path in told.groups()[1:]:
        storage.remove(path)
    storage.get_run(home, run_dir)
    assert watch.ended(run_dir) is None


def over_optimised(seed: int = 0) -> Recipe:
    """The quickstart with the aesthetic reward ten times the CLIP term instead of a twentieth of it, in eight steps."""
    return load(
        shipped_recipe("micro_textcraftor.toml"),
        {
            "seed": seed,
            "task.rollout.num_steps": 8,
            "task.window.last": 3,
            "task.rewards.clip.weight": 1.0,
            "task.rewards.aesthetic.weight": 10.0,
            "optimizer.lr": 3e-4,
            "run.batch_size": 12,
            "workers.num": 1,
            "guards.rules": [
                {"metric": "clip", "below": 0.98, "of": "start", "over": 2, "patience": 1, "action": "stop"}
            ],
        },
    )


def train(task: RewardTuningTask, recipe: Recipe, num_steps: int) -> Iterator[dict[str, float]]:
    """The figures of each step on the same twelve prompts with new noise, as `fit` logs them."""
    prompts = Path(locate("micro:train_prompts.txt")).read_text().splitlines()[: recipe.run.batch_size]
    ids = task.diffuser.tokenize(prompts)["text_encoder"].numpy()
    columns = {"input_ids": ids, "prompt": np.array(prompts, dtype=object)}
    optimizer = torch.optim.AdamW(task.module.parameters(), lr=recipe.optimizer.lr, weight_decay=0.0)
    for step in range(num_steps):
        optimizer.zero_grad()
        first = step * len(prompts)
        metrics = task.step(Rows(list(range(first, first + len(prompts))), columns))
        torch.nn.utils.clip_grad_norm_(task.module.parameters(), recipe.optimizer.clip_norm)
        optimizer.step()
        yield {"step": step + 1, **task.observe(metrics)}


@torch.no_grad()
def accuracy(task: RewardTuningTask, num_prompts: int = 60) -> float:
    """The share of held-out prompts with one object whose image is wholly right, by the micro world's exact scorer."""
    rows = [json.loads(line) for line in Path(locate("micro:held_out.jsonl")).read_text().splitlines()]
    rows = [row for row in rows if len(row["description"]["objects"]) == 1][:num_prompts]
    ids = task.diffuser.tokenize(["", *(row["prompt"] for row in rows)])
    original, tuned = (Prompt(c[1:], c[:1]) for c in (embed(e, ids) for e in (task.diffuser.encoders, task.tuned)))
    state = State(seeds.normal(99, range(len(rows)), "noise", task.diffuser.latent_shape))
    state = sample(task.guided, state, original, range(task.span.start))
    state = sample(task.guided, state, tuned, range(task.span.start, task.guided.num_steps))
    descriptions = [Description.from_json(row["description"]) for row in rows]
    judged = Referee.load(locate("micro:referee")).judge(decode(task.diffuser.vae, state.latents), descriptions)
    return judged["accuracy"].mean().item()


def test_a_guard_stops_over_optimisation_before_the_exact_scorer_falls_by_five_points() -> None:
    """The trained sum rises throughout; its CLIP term falls 2 % when accuracy hardly has, and 10 % when it has."""
    recipe = over_optimised()
    task = RewardTuningTask(recipe)
    before, when_stopped, lines = accuracy(task), None, []
    for record in train(task, recipe, num_steps=10):
        lines.append(record)
        if when_stopped is None and verdict(recipe.guards.rules, lines):
            when_stopped = accuracy(task)
    unguarded = accuracy(task)
    assert when_stopped is not None and before - when_stopped < 0.05
    assert before - unguarded > 0.1  # what the guard has prevented
    assert lines[-1]["total"] > 1.05 * lines[0]["total"]
