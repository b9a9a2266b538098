"""Three hosts, each a network namespace with its own address: train across them, cut one off, bring it back."""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import pytest

import patient
from craftor import checkpoint, job, ledger
from craftor.recipe import load
from waiting import wait_for
from watched_runs import TRAIN, assert_close, end, last_step, long_epochs, num_steps, num_workers

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[1]
RAY = Path(sys.executable).with_name("ray")
NUM_HOSTS = 3
# A host that is gone is noticed in ten seconds instead of a minute; workers do not give way to what else runs here.
HASTE = {"RAY_health_check_period_ms": "500", "RAY_health_check_timeout_ms": "1500", "RAY_worker_niceness": "0"}
HASTE |= {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


@dataclass
class Hosts:
    """Namespaces at 10.200.0.1, … on one bridge, with a Ray node in each; `folder` has Ray's sockets and logs."""

    folder: Path
    env: dict[str, str]
    label: str = f"cft{os.getpid()}"

    def name(self, host: int) -> str:
        """Of the namespace, and of its end of the cable at the bridge."""
        return f"{self.label}-{host}"

    def address(self, host: int) -> str:
        return f"10.200.0.{host + 1}"

    def build(self) -> None:
        ip("link", "add", self.label, "type", "bridge")
        ip("link", "set", self.label, "up")
        for host in range(NUM_HOSTS):
            name = self.name(host)
            ip("netns", "add", name)
            ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", name, "master", self.label, "up")
            ip("-n", name, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "eth0", "up")
            # Leads nowhere, but Ray finds its own address by asking how it would reach the world.
            ip("-n", name, "route", "add", "default", "dev", "eth0")

    def demolish(self) -> None:
        """Also what `build` has left half done."""
        for host in range(NUM_HOSTS):
            self.kill_all(host)
            subprocess.run(["ip", "netns", "del", self.name(host)], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", self.label], capture_output=True, check=False)

    def kill_all(self, host: int) -> None:
        """As if its power was cut."""
        pids = subprocess.run(["ip", "netns", "pids", self.name(host)], capture_output=True, text=True, check=False)
        inside = [process for process in psutil.process_iter() if str(process.pid) in pids.stdout.split()]
        for process in inside:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(inside, timeout=10)

    def run(self, host: int, log: Path, *command: str | Path) -> subprocess.Popen:
        with log.open("ab") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.name(host), *command],
                env=self.env,
                start_new_session=True,
                stdout=file,
                stderr=file,
            )

    def start_ray(self, host: int, log: Path) -> None:
        """The head trains nothing; every other host has room for one training worker."""
        heads = ["--head", "--port=6379", "--num-cpus=0", "--include-dashboard=false"]
        joins = [f"--address={self.address(0)}:6379", "--num-cpus=1"]
        options = [f"--node-ip-address={self.address(host)}", f"--temp-dir={self.folder / str(host)}"]
        self.run(host, log, RAY, "start", "--block", "--disable-usage-stats", *options, *(joins if host else heads))

    def has_raylet(self, host: int) -> bool:
        return any((self.folder / str(host)).glob("session_*/sockets/raylet*"))

    def cut(self, host: int) -> None:
        ip("link", "set", self.name(host), "down")

    def restore(self, host: int) -> None:
        ip("link", "set", self.name(host), "up")


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if os.geteuid() or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    env = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
    env |= {**patient.environment(0.3, ROOT / "platform", ROOT / "rewards"), **HASTE}
    # A head wants a token from whoever joins it, unless told otherwise.
    env |= {"GLOO_SOCKET_IFNAME": "eth0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    made = Hosts(Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp")), env)
    try:
        try:
            made.build()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        yield made
    finally:
        made.demolish()
        shutil.rmtree(made.folder, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_host_may_be_cut_off_and_come_back(hosts: Hosts, tiny_recipe: Path, tmp_path: Path) -> None:
    """Two hosts train, then one, then two again; the ledger is whole, and the losses are those of one worker."""
    changes = {
        **long_epochs(tmp_path, 1024),
        "run.num_steps": 100_000,
        "run.checkpoint_every": 4,
        "optimizer.cosine_from": 1.0,
        "optimizer.lr": 1e-5,
    }
    out, log = tmp_path / "runs" / "hosts", tmp_path / "log"
    tiny_recipe.write_text(tiny_recipe.read_text().replace("register = {", "# register = {"))
    patient.watch(tiny_recipe)
    hosts.start_ray(0, log)
    wait_for(partial(hosts.has_raylet, 0))
    for host in range(1, NUM_HOSTS):
        hosts.start_ray(host, log)
    wait_for(lambda: all(map(hosts.has_raylet, range(NUM_HOSTS))))
    elastic = [*(f"{key}={value}" for key, value in changes.items()), "workers.num=[1,2]", "workers.resize_s=2"]
    hosts.env["RAY_ADDRESS"] = f"{hosts.address(0)}:6379"
    driver = hosts.run(
        0, log, *TRAIN, str(tiny_recipe), "--out", str(out), *(part for own in elastic for part in ("--set", own))
    )
    try:
        wait_for(lambda: num_workers(out) == 2, driver)
        hosts.cut(2)
        wait_for(lambda: num_workers(out) == 1, driver)
        hosts.kill_all(2)
        hosts.restore(2)
        hosts.start_ray(2, log)
        wait_for(lambda: num_workers(out) == 2, driver)
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(60) == 143
    finally:
        end(driver)
    last = last_step(out)
    assert ledger.audit(out).workers == [2, 1, 2]
    assert last == num_steps(out)
    alone = job.train(load(tiny_recipe, changes | {"run.num_steps": last}), tiny_recipe, tmp_path / "alone").run_dir
    assert checkpoint.latest(alone) is not None
    assert_close(out, alone)
