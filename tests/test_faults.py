"""What a run survives: a dead prefix actor, MLflow away for a while; and a straggler has a name."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from craftor import job, ledger, tracking
from craftor.fit import METRICS
from craftor.recipe import load
from craftor.straggler import FACTOR, STEPS, Pace

SHORT = {"run.num_steps": 12, "register": None}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, tiny: Path, cluster: None) -> Path:
    """A run that nothing disturbed."""
    from conftest import write_tiny_recipe

    folder = tmp_path_factory.mktemp("undisturbed")
    path = write_tiny_recipe(tiny, folder)
    return job.train(load(path, SHORT), path, folder / "run").run_dir


@pytest.mark.slow
@pytest.mark.ray
def test_a_killed_prefix_actor_is_replaced(expected: Path, tiny_recipe: Path, tmp_path: Path) -> None:
    out, killed = tmp_path / "run", []

    def kill() -> None:
        wait_for(lambda: steps(out) >= 3)
        for process in psutil.process_iter(["cmdline"]):
            title = " ".join(process.info["cmdline"] or [])
            if title.startswith("ray::") and "Prefix" in title:
                process.kill()
                killed.append(title)

    with doing(kill):
        job.train(load(tiny_recipe, SHORT | {"task.prefix": {"mode": "stage"}}), tiny_recipe, out)
    assert killed
    assert_same(out, expected)


@pytest.mark.ray
@pytest.mark.slow
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
        wait_for(lambda: steps(out) >= 3)
        stop(servers[0])
        wait_for(lambda: steps(out) >= 20)
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
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
        + ["--backend-store-uri", f"sqlite:///{folder / 'server.db'}", "--default-artifact-root", str(folder / "a")],
        env=os.environ | {"MLFLOW_TRACKING_URI": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def answers() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    wait_for(answers)
    return server


def stop(server: subprocess.Popen) -> None:
    if server.poll() is None:
        for process in [*psutil.Process(server.pid).children(recursive=True), psutil.Process(server.pid)]:
            process.kill()
        server.wait()


def steps(out: Path) -> int:
    return len((out / METRICS).read_text().splitlines()) if (out / METRICS).exists() else 0


def assert_same(ours: Path, expected: Path) -> None:
    found, wanted = (
        load_file(run / "checkpoints" / "step-000012" / "trainer" / "module.safetensors") for run in (ours, expected)
    )
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert ledger.audit(ours) == ledger.audit(expected)
