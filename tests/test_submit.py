"""`ray job submit` to a head with a token: follow, stop with a final checkpoint, submit again to go on; exit codes."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from craftor import checkpoint
from craftor.run_files import METRICS
from waiting import wait_for
from watched_runs import end, num_steps

pytestmark = pytest.mark.ray
RAY = Path(sys.executable).with_name("ray")
ROOT = Path(__file__).parents[1]
NUM_STEPS = 60


@dataclass(frozen=True)
class Head:
    """A Ray head with its job server; `env` holds the token, and has what the command line needs to reach it."""

    address: str
    env: dict[str, str]

    def ray(self, *arguments: str, seconds: float = 200) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [RAY, *arguments], env=self.env, capture_output=True, text=True, timeout=seconds, check=False
        )

    def submit(self, *command: str, submission_id: str, wait: bool = True) -> subprocess.CompletedProcess[str]:
        """As for a cluster with bare Ray: where craftor lies, and how long a stop may take, go into the job."""
        environment = {"env_vars": {"PYTHONPATH": self.env["PYTHONPATH"], "RAY_JOB_STOP_WAIT_TIME_S": "60"}}
        return self.ray(
            *("job", "submit", "--address", self.address, "--submission-id", submission_id),
            *("--runtime-env-json", json.dumps(environment), *(() if wait else ("--no-wait",))),
            *("--", sys.executable, "-m", "craftor", *command),
        )


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    home = tmp_path_factory.mktemp("home")
    # Ray's sockets lie below, and their paths may have some hundred characters.
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    dashboard = free_port()
    env = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
    env |= {
        "HOME": str(home),
        "RAY_AUTH_MODE": "token",
        "RAY_worker_niceness": "0",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "platform"), str(ROOT / "rewards")]),
    }
    subprocess.run([RAY, "get-auth-token", "--generate"], env=env, check=True, capture_output=True)
    process = subprocess.Popen(
        [RAY, "start", "--head", "--block", f"--port={free_port()}", f"--dashboard-port={dashboard}", "--num-cpus=4"]
        + [f"--dashboard-agent-listen-port={free_port()}", f"--temp-dir={folder}", "--disable-usage-stats"]
        + ["--include-log-monitor=false"],
        env=env,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    made = Head(f"http://127.0.0.1:{dashboard}", env)
    try:
        # Each question is a process of three seconds: none before somebody listens.
        wait_for(lambda: listens(dashboard), process)
        # Jobs are listed before there is an agent that takes one.
        wait_for(lambda: made.ray("job", "submit", "--address", made.address, "--", "true").returncode == 0, process)
        yield made
    finally:
        end(process)
        shutil.rmtree(folder, ignore_errors=True)


def test_without_the_token_nobody_submits(head: Head, tmp_path: Path) -> None:
    stranger = Head(head.address, head.env | {"HOME": str(tmp_path), "RAY_AUTH_TOKEN": "a guess"})
    refused = stranger.ray("job", "list", "--address", head.address)
    assert refused.returncode != 0
    assert "token" in refused.stdout + refused.stderr


def test_a_mistake_fails_the_job(head: Head, tmp_path: Path) -> None:
    failed = head.submit("train", str(tmp_path / "missing.toml"), submission_id="missing")
    assert failed.returncode == 1
    assert "no such recipe" in failed.stdout and "exit code 2" in failed.stdout + failed.stderr


def test_submit_follow_stop_and_submit_again(head: Head, tiny_recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "submitted"
    changes = (f"run.num_steps={NUM_STEPS}", "run.checkpoint_every=1000", "optimizer.cosine_from=1.0")
    sets = [part for change in changes for part in ("--set", change)]
    begun = head.submit("train", str(tiny_recipe), "--out", str(out), *sets, submission_id="first", wait=False)
    assert begun.returncode == 0, begun.stderr
    try:
        wait_for(lambda: num_steps(out) > 1)
    except AssertionError:
        print(head.ray("job", "logs", "--address", head.address, "first").stdout)
        raise
    stopped = head.ray("job", "stop", "--address", head.address, "first")
    assert stopped.returncode == 0, stopped.stderr
    logs = head.ray("job", "logs", "--address", head.address, "first").stdout
    assert "stopped by SIGTERM" in logs and f"craftor train --resume {out}" in logs

    last = checkpoint.latest(out)
    assert last is not None
    lines = (out / METRICS).read_text().splitlines()
    assert checkpoint.step_of(last) == len(lines) < NUM_STEPS

    again = head.submit("train", "--resume", str(out), submission_id="second")
    assert again.returncode == 0, again.stdout[-2000:]
    assert f"step {NUM_STEPS}/{NUM_STEPS}" in again.stdout and f"step-{NUM_STEPS:06d}" in again.stdout
    assert [json.loads(line)["step"] for line in (out / METRICS).read_text().splitlines()] == [*range(1, NUM_STEPS + 1)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
