"""The trials of a search in an SQLite file, and Optuna's choice of the next: known again after any interruption.

The values of trial n follow from (seed, n) and from the trials that had ended when it was asked for, so a search that
goes on after an interruption asks for what it would have asked for without.
"""

import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, GridSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from craftor.searching.settings import Distribution, Search, Value

STATES = {
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "stopped",
    TrialState.FAIL: "failed",
}


@dataclass(frozen=True)
class Tried:
    """One trial as it stands."""

    number: int
    state: str
    values: dict[str, Value]
    scores: dict[str, float]
    """The last evaluation's; none while it runs."""
    violations: dict[str, float]
    """By constraint; more than 0 breaks it."""

    @property
    def eligible(self) -> bool:
        """Whether it may win: it ran to its end and breaks no constraint."""
        return self.state == "finished" and all(violation <= 0 for violation in self.violations.values())


class Study:
    """Ask, report, tell."""

    def __init__(
        self,
        path: Path,
        search: Search,
        space: Mapping[str, Distribution],
        *,
        seed: int,
        num_trials: int,
        starts: Sequence[Mapping[str, Value]] = (),
    ) -> None:
        """`starts` are tried first, in a new study; a grid has none of them and no more trials than points."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.search, self.seed = search, seed
        self.space = {key: _optuna(distribution) for key, distribution in space.items()}
        self.listed = {key: distribution.values for key, distribution in space.items()}
        points = len(list(itertools.product(*(v or () for v in self.listed.values()))))
        self.num_trials = min(num_trials, points) if search.searcher == "grid" else num_trials
        self.optuna = optuna.create_study(
            storage=f"sqlite:///{path}",
            study_name="search",
            directions=[objective.direction for objective in search.objectives],
            load_if_exists=True,
        )
        if search.searcher != "grid" and not self.optuna.get_trials(deepcopy=False):
            for start in starts[:num_trials]:
                if all(start[key] in distribution for key, distribution in space.items()):
                    self.optuna.enqueue_trial(dict(start))

    def trials(self) -> list[Tried]:
        """In the order they were asked for; those that wait in line are not among them."""
        return [_tried(trial) for trial in self._asked()]

    def running(self) -> list[Tried]:
        return [trial for trial in self.trials() if trial.state == "running"]

    @property
    def exhausted(self) -> bool:
        return len(self._asked()) >= self.num_trials

    def ask(self) -> Tried:
        """The next trial's values."""
        number = len(self._asked())
        self.optuna.sampler = self._sampler(number)
        asked = self.optuna.ask(self.space).number
        return _tried(self.optuna.trials[asked])

    def report(self, number: int, step: int, score: float) -> None:
        """A trial's score on the way, which the searcher learns from where there is one objective."""
        known = self.optuna.trials[number].intermediate_values  # an interrupted trial tells again
        if len(self.search.objectives) == 1 and step not in known:
            self._trial(number).report(self.search.objectives[0].sign * score, step)

    def finish(self, number: int, scores: Mapping[str, float], base: Mapping[str, float]) -> None:
        """A trial ran to its end."""
        trial = self._trial(number)
        trial.set_user_attr("scores", dict(scores))
        for constraint in self.search.constraints:
            violation = constraint.violation(scores[constraint.metric], base[constraint.metric])
            trial.set_constraint(constraint.name, violation)
        self._tell(number, TrialState.COMPLETE, [scores[objective.metric] for objective in self.search.objectives])

    def stop(self, number: int, scores: Mapping[str, float]) -> None:
        """The scheduler has stopped a trial."""
        self._trial(number).set_user_attr("scores", dict(scores))
        self._tell(number, TrialState.PRUNED)

    def fail(self, number: int) -> None:
        self._tell(number, TrialState.FAIL)

    def _tell(self, number: int, state: TrialState, values: Sequence[float] | None = None) -> None:
        # A sampler for the next trial is made by `ask`; a grid's would stop a loop that we do not run.
        self.optuna.sampler = RandomSampler()
        self.optuna.tell(number, values, state)

    def logarithmic(self, key: str) -> bool:
        """Whether a key is drawn by its logarithm."""
        return getattr(self.space[key], "log", False)

    def _asked(self) -> list[FrozenTrial]:
        return [t for t in self.optuna.get_trials(deepcopy=False) if t.state != TrialState.WAITING]

    def _trial(self, number: int) -> optuna.Trial:
        return optuna.Trial(self.optuna, self.optuna.trials[number]._trial_id)

    def _sampler(self, number: int) -> BaseSampler:
        seed = (self.seed * 100_003 + number) % 2**32
        match self.search.searcher:
            case "grid":  # shuffled by its seed, so it keeps the same one
                return GridSampler({key: values or () for key, values in self.listed.items()}, seed=self.seed)
            case "random":
                return RandomSampler(seed=seed)
            case "nsga2":
                return NSGAIISampler(seed=seed, population_size=max(4, self.num_trials // 4))
            case _:
                with warnings.catch_warnings():  # that grouping keys is experimental
                    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                    return TPESampler(seed=seed, n_startup_trials=max(4, self.num_trials // 4), multivariate=True)


def _optuna(distribution: Distribution) -> BaseDistribution:
    if distribution.choices is not None:
        return CategoricalDistribution(distribution.choices)
    low, high = distribution.ends
    if distribution.whole:
        return IntDistribution(int(low), int(high), log=distribution.log)
    return FloatDistribution(float(low), float(high), log=distribution.log)


def _tried(trial: FrozenTrial) -> Tried:
    attributes: dict[str, Any] = trial.user_attrs
    return Tried(
        trial.number, STATES[trial.state], dict(trial.params), attributes.get("scores", {}), dict(trial.constraints)
    )
