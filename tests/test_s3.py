"""A run whose home is a slow S3 server that refuses a third of all calls: stopped, and gone on with elsewhere."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import patient
from craftor import ledger
from waiting import wait_for
from watched_runs import TRAIN, TWO, assert_same_weights, end, last_step, lines, long_epochs, num_steps

pytestmark = pytest.mark.ray
HOME, NUM_STEPS = "s3://runs/tiny", TWO["run.num_steps"]
# moto's S3 behind a door that keeps everybody waiting, and turns three calls of ten away once the file exists.
SERVER = """
import random, sys, time
from pathlib import Path
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple

port, trouble, refused = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
s3, chance = DomainDispatcherApplication(create_backend_app), random.Random(0)

def door(environ, start_response):
    if trouble.exists():
        time.sleep(0.05)
        if chance.random() < 0.3:
            with refused.open("a") as file:
                file.write(environ["REQUEST_METHOD"] + environ["PATH_INFO"] + chr(10))
            start_response("503 Slow Down", [("Content-Type", "text/plain"), ("Connection", "close")])
            return [b"not now"]
    return s3(environ, start_response)

run_simple("127.0.0.1", port, door, threaded=True)
"""


@dataclass(frozen=True)
class Store:
    """`env` is what a process needs to reach it."""

    env: dict[str, str]
    trouble: Path
    refused: Path


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    pytest.importorskip("moto.server", reason="moto is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
    env |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    env |= {"AWS_DEFAULT_REGION": "us-east-1"}
    made = Store(env, tmp_path / "trouble", tmp_path / "refused")
    with (tmp_path / "server.log").open("wb") as log:
        command = [sys.executable, "-c", SERVER, str(port), str(made.trouble), str(made.refused)]
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_for(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0, server)
        bucket = "import fsspec; fsspec.filesystem('s3').makedirs('runs')"
        subprocess.run([sys.executable, "-c", bucket], env=env, check=True, timeout=60)
        yield made
    finally:
        end(server)


@pytest.mark.slow
def test_a_run_stopped_on_a_bad_s3_goes_on_from_there(
    store: Store, undisturbed_of_two: Path, tiny_recipe: Path, tmp_path: Path
) -> None:
    """SIGTERM to a driver with two workers, the last step saved; `--resume s3://…` in a folder that has nothing."""
    here, there = tmp_path / "runs" / "here", tmp_path / "elsewhere" / "there"
    patient.watch(tiny_recipe)
    changes = {**TWO, **long_epochs(tmp_path), "run.checkpoint_every": 20, "run.storage": HOME}
    del changes["register"]  # this one is registered
    sets = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    store.trouble.touch()
    with (tmp_path / "log").open("wb") as log:
        first = subprocess.Popen(
            [*TRAIN, str(tiny_recipe), "--out", str(here), *sets],
            env=store.env | patient.environment(0.3),
            stdout=log,
            stderr=log,
        )
        try:
            wait_for(lambda: num_steps(here) >= 1, first)
            first.send_signal(signal.SIGTERM)
            asked = time.monotonic()
            assert first.wait(180) == 143
            print(f"stopped in {time.monotonic() - asked:.1f} s")
        finally:
            end(first)
        stopped = last_step(here)
        assert 0 < stopped < NUM_STEPS
        # The second machine has its own MLflow file: the first one's run is not in it.
        again = store.env | patient.environment(0.0) | {"MLFLOW_TRACKING_URI": f"sqlite:///{here.parent / 'mlflow.db'}"}
        resumed = [*TRAIN, "--resume", HOME, "--out", str(there)]
        subprocess.run(resumed, env=again, check=True, timeout=600, stdout=log, stderr=log)
    print(f"{len(store.refused.read_text().splitlines())} calls refused, stopped at step {stopped}")
    assert last_step(there) == NUM_STEPS
    assert [line["step"] for line in lines(there)] == [*range(1, NUM_STEPS + 1)]
    assert_same_weights(there, undisturbed_of_two)
    assert ledger.audit(there) == ledger.audit(undisturbed_of_two)
