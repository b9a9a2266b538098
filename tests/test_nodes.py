"""A run over Ray nodes that come and go: fewer workers, more workers, notice of preemption; the same training."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from craftor import checkpoint, job, ledger
from craftor.cluster import TooFewResources, await_workers
from craftor.fit import METRICS
from craftor.recipe import Workers, load

pytestmark = pytest.mark.ray
# A head with room for one worker and a node with room for another; the node gets notice, goes, and returns.
PROGRAM = """
import json, sys, threading, time
from pathlib import Path
from ray.cluster_utils import Cluster

recipe_file, out, events = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, "resources": {"driver": 1}})
node = cluster.add_node(num_cpus=1)
cluster.wait_for_nodes()
import os
os.environ["RAY_ADDRESS"] = cluster.address
import ray
from ray._raylet import GcsClient
from craftor import checkpoint, job, recipe

said = []
def say(event):
    said.append({"event": event, "step": steps(), "checkpoints": len(list(out.glob("checkpoints/step-*")))})
    events.write_text(json.dumps(said))

def steps():
    return len((out / "metrics.jsonl").read_text().splitlines()) if (out / "metrics.jsonl").exists() else 0

def wait(condition):
    while not condition():
        time.sleep(0.05)

def come_and_go():
    global node
    wait(lambda: steps() >= 6)
    say("notice")
    gcs = GcsClient(address=cluster.address)
    gcs.drain_node(node.node_id, 2, "the test takes it back", int((time.time() + 4) * 1000))
    wait(lambda: any(checkpoint.step_of(p) % 1000 for p in out.glob("checkpoints/step-*")))
    say("saved")
    cluster.remove_node(node, allow_graceful=False)
    before = steps()
    say("gone")
    wait(lambda: checkpoint.latest(out) and steps() > before + 3)
    cluster.add_node(num_cpus=1)
    say("back")

threading.Thread(target=come_and_go, daemon=True).start()
job.train(recipe.load(recipe_file, json.loads(sys.argv[4])), recipe_file, out)
say("done")
"""


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_run_shrinks_and_grows_with_its_nodes(tiny_recipe: Path, tmp_path: Path) -> None:
    changes = {
        "workers.num": [1, 2],
        "workers.resize_s": 2.0,
        "run.num_steps": 240,
        "run.checkpoint_every": 1000,
        "optimizer.cosine_from": 1.0,
        "register": None,
    }
    out, events = tmp_path / "run", tmp_path / "events.json"
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tiny_recipe), str(out), str(events), json.dumps(changes)],
        env=env,
        check=True,
        timeout=280,
    )
    said = {event["event"]: event for event in json.loads(events.read_text())}
    assert said.keys() == {"notice", "saved", "gone", "back", "done"}
    assert said["notice"]["checkpoints"] == 0 and said["saved"]["checkpoints"], "notice made no checkpoint"
    proof = ledger.audit(out)
    assert proof.samples == 960 and proof.workers == [2, 1, 2]
    last = checkpoint.latest(out)
    assert last is not None and checkpoint.step_of(last) == 240


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
