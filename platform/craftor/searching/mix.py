"""Encoders that are tuned already -> the mixture of them that scores best, by generating and scoring alone.

"Reward soups" (Rame et al. 2023) in the space of embeddings: one training per reward, then any number of trade-offs
between them. Each encoder has a weight and a window of denoising steps; the base has what the active weights leave.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
import tomli_w
import torch
from ray import tune

from craftor import tracking, trainable
from craftor.allocation import keep_freed_memory
from craftor.cluster import ray_session
from craftor.diffuser import load as load_diffuser
from craftor.locate import absolute
from craftor.mixture import Member
from craftor.quiet import hush
from craftor.recipe import Recipe, RecipeError, RewardTuning, load
from craftor.run_files import write_json
from craftor.searching.ingredients import Ingredient, ingredients
from craftor.searching.inputs import check
from craftor.searching.judge import BASE, Judge, judge_base
from craftor.searching.outcome import reason, require_front
from craftor.searching.probe import SCORE
from craftor.searching.report import write_search_report
from craftor.searching.settings import Distribution, Value
from craftor.searching.study import Study, Tried
from craftor.searching.table import TrialTable
from craftor.searching.tuning import tuned

ENCODERS, MIXTURE = "encoders.json", "mixture.json"


@dataclass(frozen=True)
class Mixed:
    folder: Path
    trials: list[Tried]
    front: list[Tried]
    pages: list[Path]


def search_mix(recipe: Recipe, source: Path, encoders: Sequence[str], out: Path) -> Mixed:
    """Start in an empty or missing folder; `recipe` has the objectives and the prompts in its `[search]`.

    `encoders` are run folders, bundle folders or names in the registry (`models:/NAME@ALIAS`).
    """
    check(recipe, source)
    if out.exists() and any(out.iterdir()):
        raise RecipeError(f"{out}: not empty; choose another --out, or go on by: craftor search-mix --resume {out}")
    tracking.client(out.parent)
    out.mkdir(parents=True, exist_ok=True)
    recipe = absolute(recipe)
    found = ingredients(recipe, encoders, out)
    (out / "recipe.toml").write_text(tomli_w.dumps(recipe.data_of()))
    write_json(out / ENCODERS, [asdict(ingredient) for ingredient in found])
    return _run(recipe, found, out)


def resume_mix(out: Path) -> Mixed:
    """Go on with a search of mixtures."""
    if not (out / ENCODERS).is_file():
        raise RecipeError(f"{out}: no search of mixtures to resume there (no {ENCODERS})")
    found = [Ingredient(**{**data, "steps": tuple(data["steps"])}) for data in json.loads((out / ENCODERS).read_text())]
    return _run(load(out / "recipe.toml"), found, out)


def mix_space(recipe: Recipe, found: Sequence[Ingredient]) -> dict[str, Distribution]:
    """Of each encoder, its weight, the first denoising step it acts in, and for how many."""
    assert recipe.search is not None and isinstance(recipe.task, RewardTuning)
    mix, num_steps = recipe.search.mix, recipe.task.rollout.num_steps
    if mix.earliest >= num_steps - 1:
        raise RecipeError(f"search.mix.earliest = {mix.earliest}: allowed: less than {num_steps - 1}")
    space = {}
    for name in (ingredient.name for ingredient in found):
        space[f"{name}.weight"] = Distribution(low=0.0, high=mix.max_weight)
        space[f"{name}.first"] = Distribution(low=mix.earliest, high=num_steps - 1)
        space[f"{name}.steps"] = Distribution(low=1, high=num_steps - mix.earliest)
    return space


def starts(found: Sequence[Ingredient]) -> list[dict[str, Value]]:
    """Tried first: each encoder alone, and all in equal parts, in the windows they were trained for."""
    windows = {f"{i.name}.first": i.steps[0] for i in found} | {
        f"{i.name}.steps": i.steps[1] - i.steps[0] for i in found
    }
    shares = [{f"{i.name}.weight": float(i is alone) for i in found} for alone in found]
    shares.append({f"{i.name}.weight": 1 / len(found) for i in found})
    return [{**windows, **weights} for weights in shares]


class MixTrial(tune.Trainable):
    """An actor that keeps the model, the prompts and every encoder's embeddings of them; a trial is one judgement."""

    def setup(self, config: dict[str, Any]) -> None:
        hush()
        recipe = Recipe.model_validate(config["recipe"])
        torch.set_num_threads(recipe.workers.threads)
        diffuser = load_diffuser(recipe.model, "cuda" if recipe.workers.gpu else "cpu")
        self.judge = Judge(recipe, diffuser, Path(config["judge"]))
        self.prompts = {
            ingredient["name"]: self.judge.embed(
                {**diffuser.encoders, **trainable.load(diffuser, Path(ingredient["folder"]))}
            )
            for ingredient in config["ingredients"]
        }
        keep_freed_memory()

    def step(self) -> dict[str, Any]:
        means = self.judge.means(self.judge.scores(self._members()))
        first = self.judge.search.objectives[0]
        return {"step": 1, SCORE: first.sign * means[first.metric], **means, "done": True}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        return True  # only the values change, and `step` reads them

    def _members(self) -> list[Member]:
        values, end = self.config["values"], self.judge.guided.num_steps
        return [
            Member(prompt, values[f"{name}.weight"], acting(values, name, end)) for name, prompt in self.prompts.items()
        ]


def acting(values: dict[str, Any], name: str, num_steps: int) -> range:
    """The denoising steps an encoder acts in, cut off at the last."""
    first = values[f"{name}.first"]
    return range(first, min(first + values[f"{name}.steps"], num_steps))


def _run(recipe: Recipe, found: list[Ingredient], out: Path) -> Mixed:
    assert recipe.search is not None
    if recipe.search.searcher == "grid":
        raise RecipeError('search.searcher = "grid": weights have no list of values; allowed: tpe, nsga2, random')
    judged = recipe.search.mix.num_prompts or recipe.search.num_prompts
    search = recipe.search.model_copy(update={"asha": None, "num_prompts": judged})
    recipe = recipe.model_copy(update={"search": search})
    judge, resources = out / "judge", search.resources or {"CPU": 1, "GPU": int(recipe.workers.gpu)}
    with ray_session(search.concurrent):
        if not (judge / BASE).exists():
            begin = ray.remote(num_cpus=1, num_gpus=int(recipe.workers.gpu))(judge_base)
            ray.get(begin.remote(recipe.model_dump(by_alias=True), str(judge.resolve()), search.mix.earliest))
        base = json.loads((judge / BASE).read_text())["scores"]
        space = mix_space(recipe, found)
        study = Study(
            out / "study.db", search, space, seed=recipe.seed, num_trials=search.mix.num_trials, starts=starts(found)
        )
        given = {
            "recipe": recipe.data_of(),
            "judge": str(judge.resolve()),
            "ingredients": [asdict(ingredient) for ingredient in found],
            "num_steps": 1,
        }
        table = TrialTable(search, list(space), study.num_trials)
        tuned(
            tune.with_resources(MixTrial, resources),
            study,
            table,
            out,
            base=base,
            prepare=lambda trial: {**given, "values": trial.values},
            concurrent=search.concurrent,
            num_steps=1,
            reuse_actors=True,
        )
    return _conclude(recipe, found, study, base, out)


def _conclude(recipe: Recipe, found: list[Ingredient], study: Study, base: dict[str, float], out: Path) -> Mixed:
    """Report, `mixture.json` with the winners' weights and windows, and one run in MLflow."""
    trials = study.trials()
    errors = {trial.number: "see its folder" for trial in trials if trial.state == "failed"}
    pages = write_search_report(out, recipe, trials, base, errors, study)
    winners = require_front(trials, study.search, list(errors.values()), out)
    write_json(
        out / MIXTURE,
        {
            "chosen_by": reason(study.search),
            "base": base,
            "mixtures": [
                {"trial": w.number, "scores": w.scores, "encoders": _recipe_of(w, found, recipe)} for w in winners
            ],
        },
    )
    _log(recipe, winners[0], [*pages, out / MIXTURE], out)
    return Mixed(out, trials, winners, [*pages, out / MIXTURE])


def _recipe_of(winner: Tried, found: Sequence[Ingredient], recipe: Recipe) -> list[dict[str, Any]]:
    assert isinstance(recipe.task, RewardTuning)
    num_steps = recipe.task.rollout.num_steps
    encoders = []
    for ingredient in found:
        steps = acting(winner.values, ingredient.name, num_steps)
        weight = winner.values[f"{ingredient.name}.weight"]
        encoders.append({**asdict(ingredient), "weight": weight, "steps": [steps.start, steps.stop]})
    return encoders


def _log(recipe: Recipe, winner: Tried, files: Sequence[Path], out: Path) -> None:
    connected = tracking.client(out.parent)
    tracker = tracking.Tracker.start(connected, recipe, None, name=f"{recipe.name}/mix")
    with tracker.reachable():
        tracker.figures({f"search/{name}": value for name, value in winner.scores.items()})
        for file in files:
            tracker.artifacts(file, "search")
        tracker.finish()
