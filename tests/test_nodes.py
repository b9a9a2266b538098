"""As many workers as there is room for: the same training, or a wait and a refusal."""

import json
from pathlib import Path

import pytest

from craftor import job, ledger
from craftor.cluster import TooFewResources, await_workers
from craftor.fit import METRICS
from craftor.recipe import Workers, load

pytestmark = pytest.mark.ray


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


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
