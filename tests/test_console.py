"""The live line: every record once, whatever happens to the file underneath."""

import io
import json
import time
from pathlib import Path

import pytest
from rich.console import Console

from craftor.console import Pace, Tail, follow, rewards_of, table
from waiting import wait_for


def record(step: int, **more: float) -> dict:
    return {"step": step, "loss": -1.0, "total": 1.0, "clip": 0.25, "grad_norm": 0.1, "lr": 1e-4, "drift": 0.0, **more}


def lines(*steps: int) -> str:
    return "".join(json.dumps(record(step)) + "\n" for step in steps)


def plain() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=200)


def test_every_record_once_and_drained_on_leaving(tmp_path: Path) -> None:
    path, seen = tmp_path / "metrics.jsonl", []
    with follow(path, 5, on_line=lambda r: seen.append(r["step"]), console=plain()):
        time.sleep(0.05)  # the file does not exist yet
        path.write_text(lines(1, 2))
        wait_for(lambda: seen == [1, 2])
        with path.open("a") as file:
            file.write(lines(3, 4, 5))
    assert seen == [1, 2, 3, 4, 5]


def test_torn_line_waits_for_its_end(tmp_path: Path) -> None:
    tail, text = Tail(tmp_path / "m"), lines(1, 2)
    (tmp_path / "m").write_text(text[:-5])
    assert [r["step"] for r in tail.read()] == [1]
    assert tail.read() == []
    (tmp_path / "m").write_text(text)
    assert [r["step"] for r in tail.read()] == [2]


def test_rewritten_shorter_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "m"
    tail = Tail(path)
    path.write_text(lines(1, 2, 3, 4, 5))
    assert len(tail.read()) == 5
    path.write_text(lines(1, 2))
    assert tail.read() == []
    path.write_text(lines(1, 2, 3, 4, 5, 6))
    assert [r["step"] for r in tail.read()] == [6]


def test_rewritten_and_longer_again_between_two_readings(tmp_path: Path) -> None:
    path = tmp_path / "m"
    tail = Tail(path)
    path.write_text(lines(1, 2, 3))
    assert len(tail.read()) == 3
    path.write_text("".join(json.dumps(record(step, images_per_second=12.34)) + "\n" for step in range(1, 6)))
    assert [r["step"] for r in tail.read()] == [4, 5]


def test_cutting_a_torn_line_is_no_rewrite(tmp_path: Path) -> None:
    path = tmp_path / "m"
    tail = Tail(path)
    path.write_text(lines(1, 2) + '{"step": 3, "lo')
    assert len(tail.read()) == 2
    path.write_text(lines(1, 2, 3))
    assert [r["step"] for r in tail.read()] == [3]


def test_steps_logged_by_an_earlier_process_are_not_repeated(tmp_path: Path) -> None:
    path, seen = tmp_path / "m", []
    path.write_text(lines(1, 2, 3))
    with follow(path, 3, on_line=lambda r: seen.append(r["step"]), after=2, console=plain()):
        pass
    assert seen == [3]


def test_output_that_is_no_terminal_gets_a_line_every_ten_steps(tmp_path: Path) -> None:
    console = plain()
    (tmp_path / "m").write_text(lines(*range(1, 26)))
    with follow(tmp_path / "m", 30, console=console):
        pass
    printed = console.file.getvalue().splitlines()
    assert [line.split()[1] for line in printed] == ["1/30", "10/30", "20/30", "25/30"]
    assert "total 1.000  clip 0.2500" in printed[0] and "\x1b" not in "".join(printed)


def test_terminal_shows_one_line(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    (tmp_path / "m").write_text(lines(1, 2, 3))
    with follow(tmp_path / "m", 10, console=console):
        pass
    output = console.file.getvalue()
    assert "clip 0.25" in output
    assert output.count("\n") == 1


def test_failing_logger_is_reported_after_training(tmp_path: Path) -> None:
    def fail(_: dict) -> None:
        raise ConnectionError("no tracking server")

    trained = False
    (tmp_path / "m").write_text(lines(1))
    with pytest.raises(ConnectionError, match="tracking"), follow(tmp_path / "m", 1, on_line=fail, console=plain()):
        time.sleep(0.05)
        trained = True
    assert trained


def test_rewards_are_what_is_not_bookkeeping() -> None:
    others = {"saturated": 0.0, "diversity": 0.1, "cosine/clip/pick": 0.5, "images_per_second": 3.0}
    assert rewards_of(record(1, pick=0.2, **others)) == ["clip", "pick"]


def test_time_left_follows_the_last_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    pace, now = Pace(10), iter((100.0, 103.0))
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    pace.saw([record(1)])
    assert pace.seconds_left() is None
    pace.saw([record(2), record(4)])
    assert pace.seconds_left() == 6.0  # a second a step


def test_table_marks_what_is_sure() -> None:
    sure = {"base": 5.0, "tuned": 5.91, "delta": 0.91, "ci95": [0.85, 0.97], "win_rate": 0.9, "held_out": True}
    unsure = {"base": 0.9, "tuned": 0.903, "delta": 0.003, "ci95": [-0.015, 0.02], "win_rate": 0.5, "held_out": False}
    console = plain()
    console.print(table({"quality": sure, "accuracy": unsure}))
    _, quality, accuracy = console.file.getvalue().splitlines()
    assert "+0.91 [+0.85, +0.97] ↑" in quality and "held out" in quality
    assert "+0.003 [-0.015, +0.020]" in accuracy and "↑" not in accuracy
