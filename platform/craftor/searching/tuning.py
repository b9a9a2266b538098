"""A study and a trainable -> Ray Tune, which runs the trials: each ends in the study, the table and MLflow.

Ray's own `OptunaSearch` keeps its study as a pickle of some seconds ago and cannot be told constraints; so this asks
Optuna itself, whose storage knows every trial the moment it begins.
"""

import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pydantic import ValidationError
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from craftor.explain import explain
from craftor.recipe import Recipe
from craftor.searching.probe import SCORE, read, release
from craftor.searching.settings import Search
from craftor.searching.study import Study, Tried
from craftor.searching.table import TrialTable

ERROR = "error.txt"
ENDING_SECONDS = 5.0
"""After which nothing of a trial that has ended is at work: its controller would ask for other workers."""


def tuned(
    trainable: Any,
    study: Study,
    table: TrialTable,
    folder: Path,
    *,
    base: dict[str, float],
    prepare: Callable[[Tried], dict[str, Any]],
    concurrent: int,
    num_steps: int,
    on_end: Callable[[int], None] = lambda number: None,
    reuse_actors: bool = False,
) -> None:
    """Run the trials that have not ended.

    `prepare` gives the trainable's config, its `num_steps` among it; `num_steps` is the most that any trial has;
    `on_end` hears of each trial that ends.
    """
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # else an interrupted search would be concluded
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # which is silent at verbosity 0, as the new output is not
    # Tune's own account of the last session; ours is the study.
    shutil.rmtree(folder / "ray", ignore_errors=True)
    ended = [trial for trial in study.trials() if trial.state != "running"]
    if len(ended) >= study.num_trials:
        return
    asking = Asking(study, prepare, base, folder)
    with table.shown():
        tune.Tuner(
            trainable,
            tune_config=tune.TuneConfig(
                search_alg=asking,
                scheduler=scheduler(study.search, folder, ended, num_steps),
                num_samples=study.num_trials - len(ended),
                max_concurrent_trials=concurrent,
                reuse_actors=reuse_actors,
                trial_dirname_creator=lambda trial: f"{trial.config['number']:03d}",
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str((folder / "ray").resolve()),
                callbacks=[Watching(study, table, folder, on_end)],
                # A class's trials would end with a checkpoint: but the study has all there is to keep.
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False if reuse_actors else None),
                verbose=0,
            ),
        ).fit()


def scheduler(search: Search, folder: Path, ended: Sequence[Tried], num_steps: int) -> TrialScheduler:
    """ASHA, which has heard of the trials that ended before, or none."""
    if search.asha is None:
        return FIFOScheduler()
    asha = ASHAScheduler(
        time_attr="step",
        metric=SCORE,
        mode="max",
        grace_period=min(search.asha.every, num_steps),
        reduction_factor=search.asha.reduction_factor,
        max_t=num_steps,
        stop_last_trials=False,
    )
    for trial in ended:
        known = SimpleNamespace(trial_id=f"earlier-{trial.number}")
        asha.on_trial_add(None, known)
        for line in read(trial_folder(folder, trial.number)):
            asha.on_trial_result(None, known, line)
    return asha


def trial_folder(folder: Path, number: int) -> Path:
    return folder / "trials" / f"{number:03d}"


class Asking(Searcher):
    """Tune's side of a study: unfinished trials first, with the values and folders they had, then new ones."""

    def __init__(
        self, study: Study, prepare: Callable[[Tried], dict[str, Any]], base: dict[str, float], folder: Path
    ) -> None:
        super().__init__(metric=SCORE, mode="max")
        self.study, self.prepare, self.base, self.folder = study, prepare, base, folder
        self.unfinished = study.running()
        self.numbers: dict[str, int] = {}
        self.num_steps: dict[int, int] = {}
        self.seen: dict[int, dict[str, float]] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        while self.unfinished or not self.study.exhausted:
            trial = self.unfinished.pop(0) if self.unfinished else self.study.ask()
            try:
                config = self.prepare(trial)
            except ValidationError as error:  # values that are allowed one by one, and not together
                self._refuse(trial, error)
                continue
            self.numbers[trial_id], self.num_steps[trial.number] = trial.number, config["num_steps"]
            return {"number": trial.number, **config}
        return Searcher.FINISHED

    def _refuse(self, trial: Tried, error: ValidationError) -> None:
        where = trial_folder(self.folder, trial.number)
        where.mkdir(parents=True, exist_ok=True)
        (where / ERROR).write_text(explain(error.errors()[0], Recipe))
        self.study.fail(trial.number)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Not called with the result at which the scheduler stops a trial: that comes with `on_trial_complete`."""
        number, step = self.numbers[trial_id], int(result["step"])
        if self.seen.get(number, {}).get("step") == step:
            return  # the last evaluation is told again by the trial's own function, lest it be lost
        self.seen[number] = {"step": step, **{name: result[name] for name in self.base if name in result}}
        self.study.report(number, step, result[SCORE])

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        number = self.numbers[trial_id]
        if result and SCORE in result:
            self.on_trial_result(trial_id, result)
        scores = dict(self.seen.get(number, {}))
        step = scores.pop("step", 0)
        if error or not scores:
            self.study.fail(number)
        elif step < self.num_steps[number]:
            self.study.stop(number, scores)
        else:
            self.study.finish(number, scores, self.base)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune keeps pickles of what it is given; a search goes on from its study

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the study is on disk."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a search goes on from its study: see `craftor search --resume`")


class Watching(tune.Callback):
    """What happens to trials, told to the table, to MLflow and, where one fails, to its folder."""

    def __init__(self, study: Study, table: TrialTable, folder: Path, on_end: Callable[[int], None]) -> None:
        self.study, self.table, self.folder, self.on_end = study, table, folder, on_end
        self.ended: dict[int, float] = {}
        """Trials whose workers' reservation is still to be released, and since when they have ended."""

    def __getstate__(self) -> dict[str, Any]:
        return {}  # see `Asking`

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        for number in [n for n, since in self.ended.items() if time.monotonic() - since > ENDING_SECONDS]:
            del self.ended[number]
            release(trial_folder(self.folder, number))

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._show(trial)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        self.table.progress[trial.config["number"]] = result
        self._show(trial)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._end(trial)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        number = trial.config["number"]
        told = Path(trial.error_file).read_text() if trial.error_file else "no error was recorded"
        where = trial_folder(self.folder, number)
        where.mkdir(parents=True, exist_ok=True)
        (where / ERROR).write_text(told)
        self.table.errors[number] = message(told)
        self._end(trial)

    def _end(self, trial: Trial) -> None:
        number = trial.config["number"]
        self.ended[number] = time.monotonic()
        self.on_end(number)
        self._show(trial)

    def _show(self, trial: Trial) -> None:
        self.table.show(self.study.trials(), trial.config["number"])


def message(traceback: str) -> str:
    """What an exception says, from its traceback: the last line that is not indented names it."""
    lines = [line for line in traceback.splitlines() if line.strip()]
    named = [line for line in lines if not line.startswith(" ") and ": " in line]
    return (named or lines or ["unknown"])[-1]
