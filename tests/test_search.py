"""Searches on the tiny model: what may vary, who wins, who is stopped, and that an interruption changes nothing."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import write_tiny_recipe
from craftor import checkpoint, tracking
from craftor.diffuser import load as load_diffuser
from craftor.mixture import Member
from craftor.prefix import PrefixActor
from craftor.recipe import Recipe, RecipeError, load
from craftor.searching.inputs import check
from craftor.searching.judge import Judge, judge_base
from craftor.searching.outcome import NothingFound, front, require_front
from craftor.searching.probe import EVALUATIONS
from craftor.searching.settings import MEASURED, Distribution, Search
from craftor.searching.study import Study, Tried
from craftor.searching.tuning import ERROR, Asking, message, scheduler, trial_folder
from craftor.verdict import ATTRIBUTES

PROMPTS = ("a green star", "a small green ring", "a yellow star", "a large yellow ring")
START_STOP = {"start": 0, "stop": 4}
KEEP_DIVERSITY = {"metric": "diversity", "at_least": 0.5, "relative_to_base": True}


def settings(**changes: Any) -> Search:
    space = {"x": Distribution(low=0.0, high=1.0), "k": Distribution(low=1, high=4)}
    given = {"space": space, "objectives": [{"metric": "quality"}], "num_trials": 8, "prompts": "p.jsonl"}
    return Search.model_validate({**given, **changes})


def write_search_recipe(tiny: Path, folder: Path) -> Path:
    """Three trials at most: two windows and a learning rate that no weight survives."""
    prompts = folder / "search.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    path = write_tiny_recipe(tiny, folder)
    path.write_text(
        path.read_text().replace("num = 0, threads", "num = 1, threads")
        + f"""
[search]
prompts = "{prompts}"
num_prompts = 4
num_trials = 3
concurrent = 2
searcher = "random"
objectives = [{{ metric = "pick" }}]
constraints = [{{ metric = "diversity", at_least = 0.2, relative_to_base = true }}]
mix = {{ num_trials = 4, earliest = 1 }}
[search.space]
"rewards.*.weight" = {{ low = 0.5, high = 10.0, log = true }}
"window.last" = {{ low = 1, high = 3 }}
"optimizer.lr" = {{ choices = [1e-3] }}
"""
    )
    return path


@pytest.fixture
def search_recipe(tiny: Path, tmp_path: Path) -> Path:
    return write_search_recipe(tiny, tmp_path)


# What may vary


def test_keys_are_expanded_and_trials_differ_in_them_alone(search_recipe: Path) -> None:
    recipe = load(search_recipe)
    assert list(recipe.search_space) == [
        *("task.rewards.clip.weight", "task.rewards.pick.weight", "task.window.last", "optimizer.lr"),
    ]
    trial = recipe.with_values({"task.rewards.clip.weight": 3.0, "task.window.last": 1})
    changed = {key for key, value in _flat(trial.data_of()).items() if value != _flat(recipe.data_of()).get(key)}
    assert changed == {"task.rewards.clip.weight", "task.window.last"}
    assert trial.search is None


@pytest.mark.parametrize(
    ("space", "wrong"),
    [
        ({"optimizer.lrr": {"low": 1e-4, "high": 1e-3}}, "optimizer.lrr = 0.0001: optimizer.lrr: unknown key; allowed"),
        ({"window.last": {"low": 1, "high": 9}}, "task.window.last = 9: .*do not fit in rollout.num_steps = 4"),
        ({"window.last": {"low": 0.5, "high": 2}}, "task.window.last = 0.5: task.window.last: Input should be a valid"),
        ({"rewards.clip.weight": {"low": 0.0, "high": 1.0}}, "weight is 0.0 and evaluation_only is false"),
        ({"rewards.*.wait": {"low": 0.0, "high": 1.0}}, r"rewards\.\*\.wait stands for nothing in this recipe"),
        ({"run.num_steps": {"choices": [4, "many"]}}, "run.num_steps = 'many': run.num_steps: Input should be a valid"),
        ({"rollout.num_steps": {"low": 4, "high": 8}}, "trials have task.rollout in common"),
        ({"optimizer.lr": {"low": 1e-3, "high": 1e-4}}, "low = 0.001 is not below high = 0.0001"),
        ({"optimizer.lr": {"low": 1e-3}}, r"expected \{ low, high \} or \{ choices"),
        ({"optimizer.lr": {"low": 0.0, "high": 1.0, "log": True}}, "log = true goes with low > 0"),
    ],
)
def test_a_space_is_checked_against_the_schema_before_any_trial(search_recipe: Path, space: dict, wrong: str) -> None:
    with pytest.raises(RecipeError, match=wrong) as error:
        load(search_recipe, {"search.space": space})
    assert str(search_recipe) in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "wrong"),
    [
        ("search.objectives", [{"metric": "beauty"}], "no metric 'beauty'; there are clip, pick, quality"),
        ("search.objectives", [{"metric": "total"}], "total weighs the rewards differently in every trial"),
        ("search.constraints", [{"metric": "pick"}], "give at_least or at_most for pick"),
        ("search.num_seeds", 1, "diversity is measured between the images of one prompt"),
        ("search.searcher", "grid", "rewards.*.weight has no list of values"),
    ],
)
def test_what_counts_is_checked_too(search_recipe: Path, key: str, value: object, wrong: str) -> None:
    with pytest.raises(RecipeError, match=wrong.replace("*", r"\*")):
        load(search_recipe, {key: value})


def test_trials_have_no_home_in_common(search_recipe: Path) -> None:
    with pytest.raises(RecipeError, match=r"search: run\.storage would be one home for all trials"):
        load(search_recipe, {"run.storage": "s3://bucket/search"})


def test_values_that_do_not_go_together_cost_one_trial(search_recipe: Path, tmp_path: Path) -> None:
    """Each is within its range; the search goes on, and remembers."""
    space = {"window.start": {"low": 0, "high": 1}, "window.stop": {"low": 1, "high": 4}}
    changes = {"search.space": space, "search.num_trials": 40, "search.share_prefix": False, "task.window": START_STOP}
    recipe = load(search_recipe, changes)
    study = Study(tmp_path / "study.db", recipe.search, recipe.search_space, seed=0, num_trials=40)
    prepare = lambda trial: {"num_steps": recipe.with_values(trial.values).run.num_steps}  # noqa: E731
    asking = Asking(study, prepare, {}, tmp_path)
    numbers = []
    while (suggested := asking.suggest(f"trial {len(numbers)}")) != Asking.FINISHED:
        numbers.append(suggested["number"])
    failed = [trial for trial in study.trials() if trial.state == "failed"]
    assert failed and len(numbers) + len(failed) == 40
    assert all(trial.values["task.window.start"] >= trial.values["task.window.stop"] for trial in failed)
    assert "start = 1 is not before stop = 1" in message((trial_folder(tmp_path, failed[0].number) / ERROR).read_text())


def test_a_search_may_not_see_what_the_claim_is_made_by(search_recipe: Path) -> None:
    held_out = search_recipe.parent / "held_out.jsonl"
    held_out.write_text(json.dumps({"prompt": PROMPTS[2]}) + "\n" + json.dumps({"prompt": "a ring"}) + "\n")
    evaluation = {"prompts": str(held_out), "num_prompts": 2}
    with pytest.raises(RecipeError, match=f"1 of them are held out in .evaluation.: '{PROMPTS[2]}'"):
        check(load(search_recipe, {"evaluation": evaluation}), search_recipe)
    with pytest.raises(RecipeError, match="quality is read against descriptions"):
        check(load(search_recipe, {"search.objectives": [{"metric": "quality"}]}), search_recipe)
    space = {"run.batch_size": {"choices": [2, 4]}}
    with pytest.raises(RecipeError, match="trials differ in run.batch_size"):
        check(load(search_recipe, {"search.space": space}), search_recipe)
    check(load(search_recipe, {"search.space": space, "search.share_prefix": False}), search_recipe)


# Who wins


def tried(number: int, *, state: str = "finished", broken: float = -1.0, **scores: float) -> Tried:
    return Tried(number, state, {}, scores, {"diversity >= 0.5": broken} if state == "finished" else {})


def test_a_trial_that_breaks_a_constraint_never_wins() -> None:
    trials = [
        tried(0, quality=7.0),
        tried(1, quality=9.0, broken=0.01),
        tried(2, quality=9.9, state="stopped"),
        tried(3, quality=7.5, broken=0.0),
        tried(4, state="failed"),
    ]
    assert [trial.number for trial in front(trials, settings())] == [3]
    with pytest.raises(NothingFound, match="none of 1 finished trials meets the constraints; trial 1 comes nearest"):
        require_front(trials[1:3], settings(), [], "here")
    with pytest.raises(NothingFound, match="all 1 trials failed; the first with: it burnt"):
        require_front(trials[4:], settings(), ["it burnt"], "here")


def test_a_front_is_what_nothing_else_beats() -> None:
    search = settings(objectives=[{"metric": "quality"}, {"metric": "clip", "direction": "minimize"}])
    scores = [(7.0, 0.8), (8.0, 0.9), (6.9, 0.8), (8.5, 0.95), (8.5, 0.95), (9.9, 0.1)]
    trials = [tried(i, quality=q, clip=c) for i, (q, c) in enumerate(scores[:-1])]
    assert [trial.number for trial in front(trials, search)] == [3, 4, 1, 0]
    assert [trial.number for trial in front([*trials, tried(5, quality=9.9, clip=0.1)], search)] == [5]


def test_a_bound_may_be_a_factor_of_the_base() -> None:
    (bound,) = settings(constraints=[{**KEEP_DIVERSITY, "at_least": 0.9}]).constraints
    assert bound.name == "diversity >= 0.9 x base"
    assert bound.violation(0.18, 0.2) == pytest.approx(0.0)
    assert bound.violation(0.17, 0.2) == pytest.approx(0.01)
    (limit,) = settings(constraints=[{"metric": "clip", "at_most": 0.5}]).constraints
    assert limit.violation(0.7, 0.0) == pytest.approx(0.2)


@pytest.mark.parametrize("searcher", ["tpe", "nsga2"])
def test_a_study_opened_again_asks_for_what_it_would_have_asked_for(tmp_path: Path, searcher: str) -> None:
    """Quality grows with x as diversity falls, to its bound at a half: the searcher is to look below it."""
    search = settings(searcher=searcher, constraints=[KEEP_DIVERSITY], num_trials=16)

    def opened(name: str) -> Study:
        start = {"x": 0.25, "k": 2}
        return Study(tmp_path / name, search, search.space, seed=3, num_trials=16, starts=[start])

    def judge(study: Study, trial: Tried) -> None:
        scores = {"quality": float(trial.values["x"]), "diversity": 1 - float(trial.values["x"])}
        study.finish(trial.number, scores, {"diversity": 1.0})

    whole = opened("whole.db")
    while not whole.exhausted:
        judge(whole, whole.ask())
    for _ in range(5):
        trial = opened("parts.db").ask()
        (running,) = opened("parts.db").running()
        assert running == trial
        judge(opened("parts.db"), running)
    assert opened("parts.db").trials() == whole.trials()[:5]
    assert whole.trials()[0].values == {"x": 0.25, "k": 2}
    (best,) = front(whole.trials(), search)
    assert 0.25 <= float(best.values["x"]) < 0.5
    if searcher == "tpe":
        assert sum(trial.eligible for trial in whole.trials()[8:]) >= 6, "it has learnt where the constraint is"


def test_a_grid_tries_every_point_once(tmp_path: Path) -> None:
    space = {"k": Distribution(low=1, high=2), "solver": Distribution(choices=("ddim", "euler"))}
    search = settings(searcher="grid", space=space)
    points = []
    while True:
        study = Study(tmp_path / "study.db", search, space, seed=0, num_trials=99)
        if study.exhausted:
            break
        trial = study.ask()
        study.fail(trial.number)
        points.append(tuple(trial.values.values()))
    assert sorted(points) == [(1, "ddim"), (1, "euler"), (2, "ddim"), (2, "euler")]


def test_asha_stops_what_falls_behind_and_remembers(tmp_path: Path) -> None:
    """One in two goes on from step 2, whether the others were seen in this session or before an interruption."""
    search = settings(asha={"every": 2, "num_prompts": 2})
    report = lambda asha, name, score: asha.on_trial_result(  # noqa: E731
        None, SimpleNamespace(trial_id=name), {"step": 2, "score": score}
    )
    asha = scheduler(search, tmp_path, [], num_steps=8)
    for name in "abcd":
        asha.on_trial_add(None, SimpleNamespace(trial_id=name))
    decisions = [report(asha, name, score) for name, score in zip("abcd", (1.0, 0.5, 2.0, 0.1), strict=True)]
    assert decisions == ["CONTINUE", "STOP", "CONTINUE", "STOP"]

    for number, score in enumerate((1.0, 0.5, 2.0)):
        folder = trial_folder(tmp_path, number)
        folder.mkdir(parents=True)
        (folder / EVALUATIONS).write_text(json.dumps({"step": 2, "score": score}) + "\n")
    again = scheduler(search, tmp_path, [tried(n, quality=0.0) for n in range(3)], num_steps=8)
    again.on_trial_add(None, SimpleNamespace(trial_id="d"))
    assert report(again, "d", 0.1) == "STOP"


def test_an_error_is_told_in_one_line() -> None:
    text = "Traceback (most recent call last):\n  File x\ncraftor.fit.TrainingStopped: clip is nan\n  indented\n\n"
    assert message(text) == "craftor.fit.TrainingStopped: clip is nan"


# What trials share


def test_one_rollout_passes_what_separate_ones_reach(search_recipe: Path) -> None:
    recipe = load(search_recipe)
    actor = PrefixActor(recipe.model_dump(by_alias=True))
    ids = actor.diffuser.tokenize(list(PROMPTS))["text_encoder"].numpy()
    batch = {"input_ids": ids, "prompt": np.array(PROMPTS, dtype=object), "position": np.arange(4)}
    passed = actor.passing(batch, [1, 3, 2])
    for last, stop in ((3, 1), (2, 2), (1, 3)):
        alone = PrefixActor(recipe.with_values({"task.window.last": last}).model_dump(by_alias=True))(batch)
        assert np.array_equal(passed[stop]["prefix_latents"], alone["prefix_latents"])


@pytest.mark.parametrize("solver", ["ddim", "dpm_solver_2m"])
def test_the_base_is_walked_once_and_judged_alike(search_recipe: Path, tmp_path: Path, solver: str) -> None:
    """From the kept states a mixture scores what it scores from noise, and weight 0 is the base."""
    recipe = load(search_recipe, {"task.rollout.solver": solver, "task.rewards.pick.options": {"dtype": "bf16"}})
    judge_base(recipe.model_dump(by_alias=True), str(tmp_path / "judge"), 1)
    diffuser = load_diffuser(recipe.model)
    kept, fresh = Judge(recipe, diffuser, tmp_path / "judge"), Judge(recipe, diffuser)
    assert kept.rewards["pick"].towers.dtype == torch.bfloat16, "its options are the recipe's"
    other = fresh.embed(diffuser.encoders)
    tuned = other._replace(condition=other.condition.map(lambda t: t.flip(0)))
    for members in ([Member(tuned, 0.7, range(2, 4))], [Member(tuned, 1.0, range(1, 3)), Member(other, 0.2, range(4))]):
        ours, expected = kept.scores(members), fresh.scores(members)
        assert all(np.array_equal(ours[name], expected[name]) for name in expected)
        assert not np.array_equal(ours["pick"], kept.scores([])["pick"])
    base = json.loads((tmp_path / "judge" / "base.json").read_text())["scores"]
    assert kept.means(kept.scores([Member(tuned, 0.0, range(4))])) == base
    assert kept.scores([], num_prompts=2)["pick"].shape == (2, 2)
    assert {"clip", "pick", "diversity"} == set(base)


# Whole searches


@pytest.fixture(scope="module")
def found(tiny: Path, tmp_path_factory: pytest.TempPathFactory, cluster: None) -> Any:
    """A search whose second trial fails, made once."""
    from craftor.searching.search import search

    folder = tmp_path_factory.mktemp("search")
    path = write_search_recipe(tiny, folder)
    failing = {"choices": [1e-3, 1e30]}
    overrides = {"run.num_steps": 2, "run.checkpoint_every": 1, "search.space": {"optimizer.lr": failing}}
    overrides["search.space"]["window.last"] = {"choices": [1, 2]}
    overrides |= {"search.searcher": "grid", "search.num_trials": 3}
    return search(load(path, overrides), path, folder / "runs" / "tiny-search")


@pytest.mark.ray
def test_a_search_registers_its_best_and_records_what_failed(found: Any) -> None:
    states = {trial.number: trial.state for trial in found.trials}
    failing = [trial.number for trial in found.trials if trial.values["optimizer.lr"] > 1]
    assert len(states) == 3 and all(states[n] == ("failed" if n in failing else "finished") for n in states)
    assert failing and len(failing) < 3
    for number in failing:
        told = message((trial_folder(found.folder, number) / "error.txt").read_text())
        assert "TrainingStopped: " in told and ("nan" in told or "inf" in told)
    best = max((t for t in found.trials if t.state == "finished"), key=lambda t: t.scores["pick"])
    assert [trial.number for trial in found.front] == [best.number]

    connected = tracking.client(found.folder.parent)
    version = connected.get_model_version_by_alias("tiny", "champion")
    assert version.tags["craftor.trial"] == str(best.number)
    assert version.tags["craftor.chosen_by"] == "maximize pick with diversity >= 0.2 x base"
    parent = json.loads((found.folder / "search.json").read_text())["mlflow_run_id"]
    experiment = connected.get_experiment_by_name(tracking.EXPERIMENT)
    children = connected.search_runs([experiment.experiment_id], f"tags.mlflow.parentRunId = '{parent}'")
    assert len(children) == 3
    assert sorted(run.info.status for run in children) == sorted(
        "FAILED" if n in failing else "FINISHED" for n in states
    )
    assert connected.get_metric_history(version.run_id, "search/pick")[-1].value == best.scores["pick"]
    assert {page.name for page in found.pages} == {"report.html", "pareto.png", "parallel.png"}
    page = (found.folder / "report.html").read_text()
    assert f"trial {best.number} wins" in page and page.count("data:image/png") == 4
    bundle = trial_folder(found.folder, best.number) / "bundle"
    assert (bundle / "text_encoder" / "model.safetensors").is_file()


@pytest.mark.ray
def test_a_search_goes_on_where_it_was_interrupted(found: Any, tmp_path: Path) -> None:
    """The last trial was running, one step done; what had ended is not touched, and the outcome is the same bits."""
    from craftor.searching.search import resume

    folder = tmp_path / "interrupted"
    shutil.copytree(found.folder, folder, ignore=shutil.ignore_patterns("study.db", "search.json", "run.json", "ray"))
    recipe = load(folder / "recipe.toml")
    study = Study(folder / "study.db", recipe.search, recipe.search_space, seed=recipe.seed, num_trials=3)
    base = json.loads((folder / "judge" / "base.json").read_text())["scores"]
    finished = [trial.number for trial in found.trials if trial.state == "finished"]
    interrupted = finished[-1]
    for before in found.trials:
        trial = study.ask()
        assert trial.values == before.values
        if trial.number == interrupted:
            continue
        study.finish(trial.number, before.scores, base) if before.scores else study.fail(trial.number)
    where = trial_folder(folder, interrupted)
    shutil.rmtree(where / "checkpoints" / "step-000002")
    (where / EVALUATIONS).write_text('{"step": 2, "sco')  # torn
    ended = [trial.number for trial in found.trials if trial.number != interrupted]
    kept = {n: (trial_folder(folder, n) / "metrics.jsonl").stat().st_mtime_ns for n in ended}

    resumed = resume(folder)
    assert resumed.trials == found.trials
    assert resumed.front == found.front
    assert {n: (trial_folder(folder, n) / "metrics.jsonl").stat().st_mtime_ns for n in kept} == kept
    ours, theirs = weights(where), weights(trial_folder(found.folder, interrupted))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.ray
def test_mixtures_are_searched_without_training(found: Any, tmp_path: Path) -> None:
    from craftor.searching.mix import resume_mix, search_mix

    finished = [trial.number for trial in found.trials if trial.state == "finished"]
    sources = [str(trial_folder(found.folder, n)) for n in finished][:1]
    best = found.front[0].number
    sources.append(str(trial_folder(found.folder, best) / "bundle"))
    path = found.folder / "recipe.toml"
    overrides = {"search.searcher": "tpe", "search.objectives": [{"metric": "pick"}, {"metric": "clip"}]}
    overrides["search.concurrent"] = 1
    mixed = search_mix(load(path, overrides), path, sources, tmp_path / "mix")
    assert len(mixed.trials) == 4 and all(trial.state == "finished" for trial in mixed.trials)
    first, second, equal = mixed.trials[:3]
    assert [v for k, v in first.values.items() if k.endswith(".weight")] == [1.0, 0.0]
    assert [v for k, v in equal.values.items() if k.endswith(".weight")] == [0.5, 0.5]
    # Alone and in its own window, an encoder scores what its own trial scored.
    assert second.scores == pytest.approx(found.front[0].scores, abs=1e-5)
    written = json.loads((tmp_path / "mix" / "mixture.json").read_text())
    assert [m["trial"] for m in written["mixtures"]] == [trial.number for trial in mixed.front]
    assert resume_mix(tmp_path / "mix").trials == mixed.trials
    with pytest.raises(RecipeError, match="neither a run folder, nor an encoder bundle"):
        search_mix(load(path, overrides), path, [str(tmp_path)], tmp_path / "other")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    last = checkpoint.latest(folder)
    assert last is not None and checkpoint.step_of(last) == 2
    return load_file(last / "trainer" / "module.safetensors")


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return {key: value for key, value in flat.items() if not key.startswith("search.")}


def test_the_shipped_search_is_disjoint_from_what_it_is_measured_on() -> None:
    source = Path(__file__).parents[1] / "recipes" / "micro_search.toml"
    recipe = load(source)
    check(recipe, source)
    assert isinstance(recipe, Recipe) and len(recipe.search_space) == 4


def test_what_is_measured_is_what_there_is() -> None:
    assert set(MEASURED) == {"quality", "accuracy", "diversity", *ATTRIBUTES}
