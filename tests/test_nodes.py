"""A run over Ray nodes that come and go: fewer workers, more workers, notice of preemption; the same training."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray

import patient
from craftor import checkpoint, fit, job, ledger
from craftor.cluster import TooFewResources, await_workers
from craftor.interruption import Listener, Next, heeding_sigterm
from craftor.recipe import Workers, load
from watched_runs import assert_close, lines, long_epochs

pytestmark = pytest.mark.ray
# Two nodes with room for one worker each. The second gets ten seconds' notice, is killed when they are over, and comes
# back; when two workers train again the driver gets SIGTERM.
PROGRAM = """
import json, os, signal, subprocess, sys, threading, time
from pathlib import Path

import ray
from ray._private.state import actors
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster

recipe_file, out, events, changes = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
node = cluster.add_node(num_cpus=1)
cluster.wait_for_nodes()
os.environ["RAY_ADDRESS"] = cluster.address

from craftor import checkpoint, job, recipe, run_files
from craftor.interruption import Interrupted

started, said, returned = time.monotonic(), [], []

def say(event):
    last = checkpoint.latest(out)
    said.append([event, round(time.monotonic() - started, 1), steps(), checkpoint.step_of(last) if last else 0])
    events.write_text(json.dumps(said))

def steps():
    return len((out / "metrics.jsonl").read_bytes().splitlines()) if (out / "metrics.jsonl").exists() else 0

def workers():
    '''Of the newest checkpoint's last steps.'''
    last = checkpoint.latest(out)
    return json.loads((last / "trainer" / "ledger.jsonl").read_text().splitlines()[-1])["workers"] if last else 0

def listening():
    '''Ray Train hears of notices in an actor that starts beside the workers, and takes as long to import as they do.'''
    return any(a["ActorClassName"] == "PreemptionWatcher" and a["State"] == "ALIVE" for a in actors().values())

def wait(condition):
    while not condition():
        time.sleep(0.05)

def come_and_go():
    wait(lambda: workers() == 2 and steps() >= 40 and listening())
    say("notice")
    gcs = GcsClient(address=cluster.gcs_address)
    over = time.time() + 10
    assert gcs.drain_node(node.node_id, 2, "the test takes it back", int(over * 1000))[0]
    wait(lambda: any("a node will go" in note for note in run_files.notes(out)))
    say("saved")
    time.sleep(max(0, over - time.time()))
    cluster.remove_node(node, allow_graceful=False)
    say("gone")
    wait(lambda: workers() == 1)
    say("alone")
    ray_start = [Path(sys.executable).with_name("ray"), "start", "--block", "--num-cpus=1", "--disable-usage-stats"]
    returned.append(subprocess.Popen([*ray_start, f"--address={cluster.address}"]))
    say("back")
    wait(lambda: workers() == 2)
    say("grown")
    os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=come_and_go, daemon=True).start()
try:
    job.train(recipe.load(recipe_file, changes), recipe_file, out)
except Interrupted as error:
    say("stopped")
ray.shutdown()
for process in returned:
    process.terminate()
    process.wait()
cluster.shutdown()
"""


def test_workers_of_uneven_shares_give_the_losses_of_one(cluster: None, tiny_recipe: Path, tmp_path: Path) -> None:
    """A range of counts takes what there is room for: three workers, for batches of four."""
    short = {"run.num_steps": 5, "register": None, "optimizer.cosine_from": 1.0}
    alone = job.train(load(tiny_recipe, short), tiny_recipe, tmp_path / "alone")
    many = job.train(load(tiny_recipe, short | {"workers.num": [1, 3]}), tiny_recipe, tmp_path / "many")
    assert ledger.audit(many.run_dir).workers == [3] and ledger.audit(alone.run_dir).workers == [1]
    for ours, expected in zip(lines(many.run_dir), lines(alone.run_dir), strict=True):
        for name in ("loss", "total", "clip", "pick", "grad_norm"):
            assert ours[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-5), (ours["step"], name)


def test_too_small_a_cluster_is_waited_for_then_refused(cluster: None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TooFewResources, match=r"wants 64 CPUs at least; the cluster has \d+ after 1 s"):
        await_workers(Workers(num=64, timeout_s=1))
    assert "waiting for 64 CPUs" in capsys.readouterr().out


def test_a_lost_ear_hears_no_request(cluster: None) -> None:
    with heeding_sigterm(processes=1) as (request, _):
        ear = Listener(request)
        assert ear.heard() < Next.SAVE_AND_END
        ray.kill(request)
        assert ray.wait([ear.request], timeout=20)[0]
        assert ear.heard() < Next.SAVE_AND_END


def test_a_run_that_ends_early_is_not_done(tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "_train", lambda *_: None)
    with pytest.raises(fit.TrainingStopped, match=r"nobody had asked them to; step 0 of 24 is saved.*--resume"):
        fit.fit(load(tiny_recipe), tmp_path, tmp_path / "rows", 8)


@pytest.mark.slow
def test_a_run_shrinks_and_grows_with_its_nodes(tiny_recipe: Path, tmp_path: Path) -> None:
    changes = {
        **long_epochs(tmp_path, 1024),
        "workers.num": [1, 2],
        "workers.resize_s": 2.0,
        "run.num_steps": 100_000,
        "run.checkpoint_every": 4,
        "optimizer.cosine_from": 1.0,
        "optimizer.lr": 1e-5,
        "register": None,
    }
    out, events = tmp_path / "run", tmp_path / "events.json"
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    # The watcher is off where another test of this process has started a cluster of its own.
    env |= patient.environment(0.3) | {
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1",
    }
    patient.watch(tiny_recipe)
    with (tmp_path / "log").open("wb") as log:
        program = [sys.executable, "-c", PROGRAM, str(tiny_recipe), str(out), str(events), json.dumps(changes)]
        subprocess.run(program, env=env, check=True, timeout=900, stdout=log, stderr=log)
    print(events.read_text())
    said = {event: seconds for event, seconds, _, _ in json.loads(events.read_text())}
    assert list(said) == ["notice", "saved", "gone", "alone", "back", "grown", "stopped"]
    assert said["saved"] - said["notice"] < 10 and said["stopped"] - said["grown"] < 10, "a notice is ten seconds"
    proof = ledger.audit(out)
    assert proof.workers == [2, 1, 2]
    last = checkpoint.latest(out)
    assert last is not None and checkpoint.step_of(last) == len(lines(out))
    same = changes | {"workers.num": 0, "run.num_steps": checkpoint.step_of(last)}
    alone = job.train(load(tiny_recipe, same), tiny_recipe, tmp_path / "alone").run_dir
    assert_close(out, alone)
