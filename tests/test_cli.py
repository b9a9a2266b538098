"""The command line as a user meets it: one-line errors and exit code 2, long before anything heavy is loaded."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from craftor import __version__

ROOT = Path(__file__).parents[1]


def craftor(*arguments: object, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-m", "craftor", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "COLUMNS": "200", **env},
        timeout=300,
    )


def test_masks_and_regions_are_one_for_each_picture_or_none() -> None:
    picture = ("--image", ROOT / "recipes" / "objects.png")
    for name in ("--mask", "--region"):
        result = craftor("customize", *picture, *picture, name, picture[1], "--prompt", "a ring")
        assert result.returncode == 2 and f"1 {name} for 2 --image; allowed: one for each" in result.stderr


def test_version_and_help_do_not_load_torch() -> None:
    assert craftor("--version").stdout.strip() == __version__
    for command in ("quickstart", "train", "evaluate", "report", "sync"):
        assert command in craftor("--help").stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "run.num_stps=3",
            "run.num_stps: unknown key; allowed here: batch_size, checkpoint_every, micro_batch, num_steps",
        ),
        ("task.window.last=30", "do not fit in rollout.num_steps = 4"),
        ("data.path=none.csv", "data.path = 'none.csv': no such file"),
        ("task.rewards.pick.kind=beauty", "unknown reward 'beauty'; available: aesthetic, clip_score, compressibility"),
    ],
)
def test_mistakes_end_with_one_line_and_code_2(tiny_recipe: Path, tmp_path: Path, change: str, message: str) -> None:
    started = time.monotonic()
    result = craftor("train", tiny_recipe, "--set", change, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {tiny_recipe}: ") and message in result.stderr
    assert "Traceback" not in result.stderr
    assert time.monotonic() - started < 60
    assert not (tmp_path / "runs").exists()


def test_an_unreachable_tracking_server_stops_before_work_begins(tiny_recipe: Path, tmp_path: Path) -> None:
    result = craftor("train", tiny_recipe, cwd=tmp_path, MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert result.returncode == 2
    assert "MLflow at http://127.0.0.1:9 refused or did not answer" in result.stderr
    assert "unset MLFLOW_TRACKING_URI" in result.stderr
    assert not (tmp_path / "runs" / "tiny").exists()


def test_brackets_in_a_message_are_printed(tiny_recipe: Path) -> None:
    assert "--set [bold]: expected key.path=value" in craftor("train", tiny_recipe, "--set", "[bold]").stderr


def test_resume_needs_a_run(tmp_path: Path) -> None:
    assert "no run there" in craftor("train", "--resume", tmp_path).stderr
    assert "give a recipe, or --resume RUN" in craftor("train").stderr
