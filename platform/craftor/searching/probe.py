"""A trial's scores while it trains: `evaluations.jsonl`, one line an evaluation, in the trial's folder."""

import json
from pathlib import Path
from typing import Any

from ray.util import get_current_placement_group, remove_placement_group
from ray.util.placement_group import PlacementGroup, PlacementGroupID

from craftor.mixture import Member
from craftor.recipe import Recipe, RewardTuning, Search
from craftor.searching.judge import Judge
from craftor.tasks import Task
from craftor.tasks.reward_tuning import RewardTuningTask

EVALUATIONS = "evaluations.jsonl"
RESERVED = "placement_group"
"""File with the id of what Ray reserved for the trial's workers."""
SCORE = "score"
"""What trials are compared by on the way: the first objective, more is better."""


class Probe:
    """One worker's part in evaluations: worker 0 judges, all know when."""

    def __init__(self, settings: dict[str, Any], recipe: Recipe, task: Task, run_dir: Path, step: int, rank: int):
        self.search, self.num_steps = Search.model_validate(settings["recipe"]["search"]), recipe.run.num_steps
        assert isinstance(task, RewardTuningTask)
        self.path, self.task = run_dir / EVALUATIONS, task
        lines = read(run_dir)
        self.missed = step > 0 and self.due(step) and all(line["step"] != step for line in lines)
        """Whether an interruption came between a checkpoint and its evaluation."""
        self.judge: Judge | None = None
        if rank == 0:
            common = Recipe.model_validate(settings["recipe"])
            self.judge = Judge(common, task.diffuser, Path(settings["folder"]), _same(task, recipe, common))
            temporary = self.path.with_suffix(".writing")
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines if line["step"] <= step))
            temporary.rename(self.path)
            if (group := get_current_placement_group()) is not None:
                (run_dir / RESERVED).write_text(group.id.hex())

    def due(self, step: int) -> bool:
        return step == self.num_steps or (self.search.asha is not None and step % self.search.asha.every == 0)

    def judged(self, step: int) -> dict[str, float]:
        """The metrics after optimiser step `step`, on worker 0; nothing on the others."""
        if self.judge is None:
            return {}
        asha, last = self.search.asha, step == self.num_steps
        count = self.search.num_prompts if last or asha is None else asha.num_prompts
        member = Member(self.judge.embed(self.task.tuned), 1.0, self.task.settings.acts())
        unet = self.task.guided.unet if "unet" in self.task.module else None
        means = self.judge.means(self.judge.scores([member], count, unet))
        first = self.search.objectives[0]
        line = {"step": step, SCORE: first.sign * means[first.metric], **means}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        return line


def _same(task: RewardTuningTask, recipe: Recipe, common: Recipe) -> dict[str, Any]:
    """The trial's rewards that are also those it is judged by."""
    assert isinstance(recipe.task, RewardTuning) and isinstance(common.task, RewardTuning)
    mine, theirs = recipe.task.rewards, common.task.rewards
    return {
        name: reward
        for name, reward in task.scoring.built.items()
        if name in theirs and mine[name].computed_by == theirs[name].computed_by
    }


def read(run_dir: Path) -> list[dict[str, float]]:
    """The evaluations of a trial's folder; a line that a kill has torn is left out."""
    path = run_dir / EVALUATIONS
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def release(run_dir: Path) -> None:
    """Give back what was reserved for the workers of a trial that has ended.

    Ray Train leaves that to an actor which asks the dashboard whether the run's controller lives; a local Ray has no
    dashboard, and every trial that the scheduler stopped would keep its CPUs.
    """
    path = run_dir / RESERVED
    if path.exists():
        remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(path.read_text())))
        path.unlink()
