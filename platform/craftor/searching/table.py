"""The trials of a search as a live table on a terminal, or in a log as a line for each that has ended."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from craftor.searching.settings import Search, Value
from craftor.searching.study import Tried

_STYLES = {"finished": "green", "stopped": "dim", "failed": "red", "running": "cyan"}


class TrialTable:
    """`show` after every event; `progress` is what running trials have reached."""

    def __init__(self, search: Search, keys: Sequence[str], num_trials: int, console: Console | None = None) -> None:
        self.search, self.keys, self.num_trials = search, keys, num_trials
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.progress: dict[int, Mapping[str, float]] = {}
        self.errors: dict[int, str] = {}
        self.live: Live | None = None

    @contextmanager
    def shown(self) -> Iterator[None]:
        if not self.console.is_terminal:
            yield
            return
        with Live(console=self.console, auto_refresh=False) as self.live:
            yield

    def show(self, trials: Sequence[Tried], changed: int) -> None:
        if self.live is not None:
            self.live.update(self.table(trials[-self.console.height + 4 :]), refresh=True)
            return
        trial = next(trial for trial in trials if trial.number == changed)
        if trial.state == "running":
            return
        at = f" at step {self.progress[changed]['step']:.0f}" if changed in self.progress else ""
        told = [f"{name} {value}" for name, value in zip(self._headings(), self._cells(trial), strict=True) if value]
        error = f": {self.errors[changed]}" if changed in self.errors else ""
        self.console.print(f"trial {changed + 1}/{self.num_trials} {trial.state}{at}{error}  {'  '.join(told)}")

    def table(self, trials: Sequence[Tried]) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column("trial", justify="right")
        table.add_column("")
        for heading in self._headings():
            table.add_column(heading, justify="right", no_wrap=True)
        for trial in trials:
            state = Text(trial.state, style=_STYLES[trial.state])
            if any(missed > 0 for missed in trial.violations.values()):
                state.append(" ✗", style="red")
            table.add_row(str(trial.number), state, *self._cells(trial))
        return table

    def _headings(self) -> list[str]:
        return [*(short(key) for key in self.keys), *self.search.metrics]

    def _cells(self, trial: Tried) -> list[str]:
        scores = trial.scores or self.progress.get(trial.number, {})
        values = [shown(trial.values[key]) for key in self.keys]
        return [*values, *(f"{scores[metric]:#.4g}" if metric in scores else "" for metric in self.search.metrics)]


def short(key: str) -> str:
    """A dotted key without the sections that a reader can do without."""
    return key.removeprefix("task.").removeprefix("rewards.")


def shown(value: Value) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
