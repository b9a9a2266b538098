"""What a run survives: a dead prefix actor, a full disk or object store, MLflow away; and stragglers have names."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow.server.constants import ARTIFACT_ROOT_ENV_VAR, BACKEND_STORE_URI_ENV_VAR

from craftor import job, storage, tracking
from craftor.recipe import load
from craftor.run_files import notes
from craftor.straggler import FACTOR, STEPS, Pace
from waiting import wait_for
from watched_runs import SHORT, TWO, assert_undisturbed, doing, long_epochs, num_steps, processes


@pytest.mark.ray
def test_a_killed_prefix_actor_is_replaced(undisturbed: Path, tiny_recipe: Path, tmp_path: Path) -> None:
    out, killed = tmp_path / "run", []

    def kill() -> None:
        wait_for(lambda: num_steps(out) >= 3)
        for process in processes("Prefix"):
            process.kill()
            killed.append(process.pid)

    with doing(kill):
        job.train(load(tiny_recipe, SHORT | {"task.prefix": {"mode": "stage"}}), tiny_recipe, out)
    assert killed
    assert_undisturbed(out, undisturbed)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 16 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.ray
def test_a_full_disk_costs_the_checkpoints_that_do_not_fit(
    undisturbed: Path, small_disk: Path, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's home is full from the first step to the ninth of twelve, and its disk is another than the worker's."""
    monkeypatch.setattr(storage, "FIRST_PAUSE", 0.001)
    out, home, filler, local = tmp_path / "run", small_disk / "home", small_disk / "filler", tmp_path / "local"
    local.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(local))

    def steps_done() -> int:
        """By the worker, whose metrics do not get to the driver meanwhile."""
        return max(map(num_steps, local.glob("craftor-*")), default=0)

    def fill_and_clear() -> None:
        wait_for(lambda: steps_done() >= 1)
        with filler.open("wb", buffering=0) as file:
            try:
                while file.write(bytes(1 << 16)):
                    pass
            except OSError:
                pass
        wait_for(lambda: steps_done() >= 9)
        filler.unlink()

    recipe = load(tiny_recipe, SHORT | {"run.storage": str(home)})
    with doing(fill_and_clear):
        job.train(recipe, tiny_recipe, out)
    assert all("No space left on device" in said for said in notes(out)) and notes(out)
    assert not (home / "checkpoints" / "step-000004" / "manifest.json").exists()
    assert (home / "checkpoints" / "step-000012" / "manifest.json").exists()
    assert_undisturbed(out, undisturbed)


@pytest.mark.ray
def test_each_straggler_is_named(undisturbed_of_two: Path, tiny_recipe: Path, tmp_path: Path) -> None:
    """One worker after the other gets a tenth of its time, until it is reported."""
    out = tmp_path / "run"

    def slow_down() -> None:
        wait_for(lambda: num_steps(out) >= STEPS)
        workers = processes("RayTrainWorker")
        assert len(workers) == 2
        for told, worker in enumerate(workers):
            while len(notes(out)) == told:
                worker.send_signal(signal.SIGSTOP)
                time.sleep(0.45)
                worker.send_signal(signal.SIGCONT)
                time.sleep(0.05)

    with doing(slow_down):
        job.train(load(tiny_recipe, TWO | long_epochs(tmp_path)), tiny_recipe, out)
    named = [re.fullmatch(r"worker (\d) on [\d.]+ takes ([\d.]+) times as long as the others.*", n) for n in notes(out)]
    assert sorted(found[1] for found in named if found) == ["0", "1"] and len(named) == 2
    assert all(float(found[2]) > FACTOR for found in named if found)
    assert_undisturbed(out, undisturbed_of_two)


# Ray with a small object store, which fills when the fifth step is done: what does not fit goes to the disk.
CROWDED = """
import json, sys, threading, time
from pathlib import Path
import numpy as np, ray
from craftor import job, recipe

path, out, changes = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
ray.init(address="local", num_cpus=4, object_store_memory=80 * 2**20, include_dashboard=False, log_to_driver=False)
held = []

def crowd():
    while not (out / "metrics.jsonl").exists() or len((out / "metrics.jsonl").read_bytes().splitlines()) < 5:
        time.sleep(0.05)
    for _ in range(60):
        held.append(ray.put(np.ones(5 * 2**20, dtype=np.uint8)))

thread = threading.Thread(target=crowd)
thread.start()
job.train(recipe.load(path, changes), path, out)
thread.join()
assert len(held) == 60
ray.shutdown()
"""


@pytest.mark.ray
def test_a_full_object_store_stops_nobody(undisturbed_of_two: Path, tiny_recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with (tmp_path / "log").open("wb") as log:
        subprocess.run(
            [sys.executable, "-c", CROWDED, str(tiny_recipe), str(out), json.dumps(TWO | long_epochs(tmp_path))],
            env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
            check=True,
            timeout=600,
            stdout=log,
            stderr=log,
        )
    assert_undisturbed(out, undisturbed_of_two)


# MLflow's server without the processes for jobs and for itself again that `mlflow server` starts.
SERVER = """
import sys
from mlflow.server import app
from werkzeug.serving import run_simple

run_simple("127.0.0.1", int(sys.argv[1]), app, threaded=True)
"""


@pytest.mark.ray
def test_mlflow_may_be_away_for_a_while(
    cluster: None, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is killed at step 3 and started again at step 20 of 30: it ends with every step once."""
    out = tmp_path / "run"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setattr(tracking, "_SEND_EVERY_SECONDS", 0.2)
    monkeypatch.setattr(tracking, "_RETRY_SECONDS", 0.5)
    servers = [start_mlflow(tmp_path, port)]

    def restart() -> None:
        wait_for(lambda: num_steps(out) >= 3)
        stop(servers[0])
        wait_for(lambda: num_steps(out) >= 20)
        servers.append(start_mlflow(tmp_path, port))

    try:
        with doing(restart):
            job.train(load(tiny_recipe, {"run.num_steps": 30, "register": None}), tiny_recipe, out)
        # The server may have come back after the last step.
        job.sync(out)
        run_id = json.loads((out / "run.json").read_text())["mlflow_run_id"]
        history = tracking.client(tmp_path).get_metric_history(run_id, "loss")
        assert sorted(point.step for point in history) == [*range(1, 31)]
    finally:
        for server in servers:
            stop(server)


def test_a_straggler_is_told_once_until_it_recovers() -> None:
    pace, told = Pace(3), []
    for step in range(4 * STEPS):
        slow = 1.0 if STEPS <= step < 2 * STEPS or step >= 3 * STEPS else 0.1
        told += [(step, rank) for rank, factor in pace.after([0.1, slow, 0.11]) if factor > FACTOR]
    assert [rank for _, rank in told] == [1, 1]
    assert STEPS < told[0][0] < 2 * STEPS < 3 * STEPS < told[1][0]


def start_mlflow(folder: Path, port: int) -> subprocess.Popen:
    stores = {BACKEND_STORE_URI_ENV_VAR: f"sqlite:///{folder / 'server.db'}", ARTIFACT_ROOT_ENV_VAR: str(folder / "a")}
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(port)],
        env=os.environ | {"MLFLOW_TRACKING_URI": ""} | stores,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def answers() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    wait_for(answers, server)
    return server


def stop(server: subprocess.Popen) -> None:
    server.kill()
    server.wait()
