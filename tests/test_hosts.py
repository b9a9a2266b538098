"""Three hosts, each a network namespace with its own address: train across them, cut one off, bring it back."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from craftor import checkpoint, job, ledger
from craftor.fit import METRICS
from craftor.recipe import load

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).parents[1]
RAY = Path(sys.executable).with_name("ray")
NUM_HOSTS, BRIDGE = 3, "craftor-br"
# A host that is gone is noticed in some five seconds instead of a minute.
HASTE = {"RAY_health_check_period_ms": "500", "RAY_health_check_timeout_ms": "1500"}


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@dataclass
class Hosts:
    """Namespaces `craftor0`, … at 10.77.0.1, … on one bridge, with a Ray node in each."""

    folder: Path
    env: dict[str, str]
    nodes: list[subprocess.Popen] = field(default_factory=list)

    def address(self, host: int) -> str:
        return f"10.77.0.{host + 1}"

    def build(self) -> None:
        ip("link", "add", BRIDGE, "type", "bridge")
        ip("link", "set", BRIDGE, "up")
        for host in range(NUM_HOSTS):
            name = f"craftor{host}"
            ip("netns", "add", name)
            ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", name, "master", BRIDGE, "up")
            ip("-n", name, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")

    def demolish(self) -> None:
        for node in self.nodes:
            end(node)
        for host in range(NUM_HOSTS):
            subprocess.run(["ip", "netns", "del", f"craftor{host}"], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", BRIDGE], capture_output=True, check=False)

    def run(self, host: int, *command: str | Path) -> subprocess.Popen:
        return subprocess.Popen(
            ["ip", "netns", "exec", f"craftor{host}", *command],
            env=self.env,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def start_ray(self, host: int) -> None:
        """The head has the prompts' stages, every other host room for one training worker."""
        where = ["--head", "--port=6379", "--num-cpus=0", f"--temp-dir={self.folder}", "--include-dashboard=false"]
        joins = [f"--address={self.address(0)}:6379", "--num-cpus=1"]
        options = [f"--node-ip-address={self.address(host)}", "--block", "--disable-usage-stats"]
        self.nodes.append(self.run(host, RAY, "start", *options, *(joins if host else where)))

    def cut(self, host: int) -> None:
        ip("link", "set", f"craftor{host}", "down")

    def restore(self, host: int) -> None:
        ip("link", "set", f"craftor{host}", "up")


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if os.geteuid() or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    env = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
    env |= {"PYTHONPATH": os.pathsep.join([str(ROOT / "platform"), str(ROOT / "rewards")]), **HASTE}
    env |= {"GLOO_SOCKET_IFNAME": "eth0", "RAY_ADDRESS": "10.77.0.1:6379"}
    made = Hosts(Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp")), env)
    try:
        made.build()
    except subprocess.CalledProcessError as error:
        made.demolish()
        pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
    try:
        yield made
    finally:
        made.demolish()
        shutil.rmtree(made.folder, ignore_errors=True)


def test_a_host_may_be_cut_off_and_come_back(hosts: Hosts, tiny_recipe: Path, tmp_path: Path) -> None:
    """Two hosts train, then one, then two again; the ledger is whole, and the losses are those of one worker."""
    changes = {"run.num_steps": 60, "optimizer.cosine_from": 1.0, "register": None}
    sets = [f"{key}={json.dumps(value)}" for key, value in changes.items() if value is not None]
    out = tmp_path / "runs" / "hosts"
    for host in range(NUM_HOSTS):
        hosts.start_ray(host)
    driver = hosts.run(
        0,
        *(sys.executable, "-m", "craftor", "train", str(tiny_recipe), "--out", str(out)),
        *(part for change in [*sets, "workers.num=[1,2]", "workers.resize_s=2"] for part in ("--set", change)),
    )
    try:
        wait_for(lambda: steps(out) >= 6, driver)
        hosts.cut(2)
        before = steps(out)
        wait_for(lambda: checkpoint.latest(out) is not None and steps(out) > before + 4, driver)
        end(hosts.nodes[2])
        hosts.restore(2)
        hosts.start_ray(2)
        assert driver.wait(200) == 0
    finally:
        end(driver)
    assert ledger.audit(out).samples == 240
    assert ledger.audit(out).workers[:2] == [2, 1]
    alone = tmp_path / "alone"
    job.train(load(tiny_recipe, changes), tiny_recipe, alone)
    for ours, expected in zip(lines(out), lines(alone), strict=True):
        assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-4, abs=1e-4), ours["step"]


def end(process: subprocess.Popen) -> None:
    if process.poll() is None:
        for member in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            try:
                member.kill()
            except psutil.NoSuchProcess:
                continue
        process.wait()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, seconds: float = 150) -> None:
    started = time.monotonic()
    while not condition():
        assert process.poll() is None, f"the run ended with {process.returncode}"
        assert time.monotonic() - started < seconds, "waited too long"
        time.sleep(0.1)


def steps(out: Path) -> int:
    return len((out / METRICS).read_text().splitlines()) if (out / METRICS).exists() else 0


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
