"""`metrics.jsonl`, as it grows -> one live line on the terminal, and every record once to whoever logs it."""

import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column, Table
from rich.text import Text

from craftor.guards import OTHERS, STATISTICS
from craftor.statistics import decimals, excludes_zero
from craftor.verdict import ordered

if TYPE_CHECKING:
    from craftor.doctor import Finding

_POLL_SECONDS, _PLAIN_EVERY = 0.25, 10


@contextmanager
def follow(
    metrics: Path,
    num_steps: int,
    *,
    on_line: Callable[[dict], None] | None = None,
    after: int = 0,
    console: Console | None = None,
) -> Iterator[None]:
    """Show the run's progress while the body trains; `on_line` gets each record of a step past `after` once, in order.

    The file may not exist yet, may end in half a line, and may be cut back when training resumes. On leaving, what is
    still unread is read. An error of `on_line` ends the display and is raised on leaving: it never stops training.
    """
    stop, tail = Event(), Tail(metrics, after)
    console = console or Console(highlight=False, soft_wrap=True)
    line = LiveLine(console, num_steps) if console.is_terminal else PlainLines(console, num_steps)

    def watch() -> None:
        pace = Pace(num_steps)
        while True:
            last = stop.is_set()  # asked before reading, so that the last reading comes after the last write
            records = tail.read()
            pace.saw(records)
            for record in records:
                line.show(record, pace.seconds_left())
                if on_line is not None:
                    on_line(record)
            if last:
                return
            stop.wait(_POLL_SECONDS)

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="console") as executor:
        watching = executor.submit(watch)
        try:
            yield
        finally:
            stop.set()
            try:
                watching.result()
            finally:
                line.close()


class Tail:
    """New complete lines of a file that grows, and that may be rewritten; no step is returned twice."""

    def __init__(self, path: Path, after: int = 0) -> None:
        self._path, self._step = path, after
        self._offset, self._last = 0, b""

    def read(self) -> list[dict]:
        """Records of steps not seen yet."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            # The last line read must still stand where it was, else the file was rewritten: start again.
            file.seek(self._offset - len(self._last))
            if file.read(len(self._last)) != self._last:
                self._offset, self._last = 0, b""
                file.seek(0)
            complete, newline, _torn = file.read().rpartition(b"\n")
        if not newline:
            return []
        lines = complete.split(b"\n")
        self._offset += len(complete) + 1
        self._last = lines[-1] + b"\n"
        new = []
        for record in map(json.loads, filter(None, lines)):
            if record["step"] > self._step:
                self._step = record["step"]
                new.append(record)
        return new


class Pace:
    """Time left, from when the last readings arrived rather than from the run's start: a resumed run starts late."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._seen: deque[tuple[float, int]] = deque(maxlen=40)

    def saw(self, records: list[dict]) -> None:
        if records:
            self._seen.append((time.monotonic(), records[-1]["step"]))

    def seconds_left(self) -> float | None:
        if len(self._seen) < 2:
            return None
        (first, from_step), (last, to_step) = self._seen[0], self._seen[-1]
        return (self._num_steps - to_step) * (last - first) / (to_step - from_step)


class LiveLine:
    """One line at the bottom of a terminal: bar, step, total, rewards, speed, time left."""

    def __init__(self, console: Console, num_steps: int) -> None:
        self._progress = Progress(
            BarColumn(bar_width=28 if console.width >= 110 else 10, complete_style="cyan", finished_style="cyan"),
            TextColumn("[bold]{task.completed:.0f}[/]/{task.total:.0f}"),
            TextColumn("{task.fields[values]}", table_column=Column(no_wrap=True, overflow="ellipsis"), markup=False),
            console=console,
        )
        self._task = self._progress.add_task("", total=num_steps, values="starting")
        self._progress.start()

    def show(self, record: dict, seconds_left: float | None) -> None:
        self._progress.update(self._task, completed=record["step"], values="  ".join(_values(record, seconds_left)))

    def close(self) -> None:
        self._progress.stop()


class PlainLines:
    """A line every ten steps, for logs: the first and the last step always have one."""

    def __init__(self, console: Console, num_steps: int) -> None:
        self._console, self._num_steps = console, num_steps
        self._first, self._unsaid = True, ""

    def show(self, record: dict, seconds_left: float | None) -> None:
        step = record["step"]
        self._unsaid = "  ".join([f"step {step}/{self._num_steps}", *_values(record, seconds_left)])
        if self._first or step % _PLAIN_EVERY == 0:
            self.close()
        self._first = False

    def close(self) -> None:
        if self._unsaid:
            self._console.print(self._unsaid, markup=False)
        self._unsaid = ""


def rewards_of(record: dict) -> list[str]:
    """The reward names in a record: no other metric has a plain name of its own."""
    return [key for key in record if key not in ("step", *OTHERS, *STATISTICS) and "/" not in key]


def table(metrics: dict[str, dict]) -> Table:
    """The evaluation as a terminal table; an arrow marks rows whose interval excludes zero."""
    result = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    result.add_column("metric")
    for heading in ("base", "tuned", "change [95% interval]", "wins"):
        result.add_column(heading, justify="right", no_wrap=True)
    result.add_column("")
    for name, row in ordered(metrics).items():
        digits, sure = decimals(row["ci95"]), excludes_zero(row["ci95"])
        style = ("green" if row["delta"] > 0 else "red") if sure else ""
        low, high = row["ci95"]
        change = Text(f"{row['delta']:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]", style=style)
        change.append((" ↑" if row["delta"] > 0 else " ↓") if sure else "  ", style=style)
        result.add_row(
            Text(name, style="bold" if row.get("held_out") else ""),
            f"{row['base']:.{digits}f}",
            f"{row['tuned']:.{digits}f}",
            change,
            f"{row['win_rate']:.0%}",
            Text("held out" if row.get("held_out") else "", style="cyan"),
        )
    return result


def breakdown_table(rows: Sequence[dict]) -> Table:
    """A suite's categories, metric by metric; a star where the corrected p is below 0.05."""
    result = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for heading in ("category", "metric"):
        result.add_column(heading)
    for heading in ("prompts", "base", "tuned", "change [95% interval]", "wins", "p (Holm)"):
        result.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        digits, (low, high) = decimals(row["ci95"]), row["ci95"]
        result.add_row(
            row["category"],
            row["metric"],
            str(row["num_prompts"]),
            f"{row['base']:.{digits}f}",
            f"{row['tuned']:.{digits}f}",
            f"{row['delta']:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]",
            f"{row['win_rate']:.0%}",
            f"{row['p_holm']:.3g}{' *' if row['p_holm'] < 0.05 else ''}",
        )
    return result


def findings_table(findings: "Sequence[Finding]") -> Table:
    """`craftor doctor`'s findings; what failed has its remedy below."""
    result = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    for finding in findings:
        mark, style = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "failure": ("✗", "red")}[finding.verdict]
        said = Text(finding.said)
        if finding.remedy:
            said.append(f"\n→ {finding.remedy}", style="cyan")
        result.add_row(Text(mark, style=style), Text(finding.check, style="bold"), said)
    return result


def _values(record: dict, seconds_left: float | None) -> list[str]:
    first = "total" if "total" in record else "loss"
    shown = [f"{name} {record[name]:#.4g}" for name in (first, *rewards_of(record)) if name in record]
    if "images_per_second" in record:
        shown.append(f"{record['images_per_second']:.3g} images/s")
    if seconds_left is not None:
        minutes, seconds = divmod(round(seconds_left), 60)
        hours, minutes = divmod(minutes, 60)
        shown.append((f"{hours}:{minutes:02}" if hours else f"{minutes}") + f":{seconds:02} left")
    return shown
