"""MLflow goes away during a run: training goes on, nothing is lost, nothing is sent twice."""

import json
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from craftor import tracking


@pytest.fixture
def connected(tmp_path: Path) -> MlflowClient:
    return tracking.client(tmp_path)


@pytest.fixture
def tracker(connected: MlflowClient) -> tracking.Tracker:
    experiment = connected.get_experiment_by_name(tracking.EXPERIMENT)
    assert experiment is not None
    return tracking.Tracker(connected, connected.create_run(experiment.experiment_id).info.run_id)


def logged(tracker: tracking.Tracker) -> list[tuple[int, float]]:
    history = tracker.client.get_metric_history(tracker.run_id, "loss")
    return [(point.step, point.value) for point in history]


def test_lines_wait_while_the_server_is_away(tracker: tracking.Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    send = tracker.client.log_batch

    def refuse(*_: object, **__: object) -> None:
        raise MlflowException("connection refused")

    monkeypatch.setattr(tracker.client, "log_batch", refuse)
    for step in (1, 2, 3):
        tracker.log({"step": step, "loss": -step})
    assert not tracker.flush()
    assert tracker.outage == "connection refused"
    monkeypatch.setattr(tracker.client, "log_batch", send)
    assert tracker.flush()
    assert tracker.outage is None
    assert logged(tracker) == [(1, -1), (2, -2), (3, -3)]


def test_sync_sends_what_is_missing_and_nothing_twice(tracker: tracking.Tracker, tmp_path: Path) -> None:
    tracker.log({"step": 1, "loss": 0.5})
    tracker.flush()
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps({"step": step, "loss": 0.5 / step}) + "\n" for step in (1, 2, 3)))
    for _ in range(2):
        tracking.sync(tracking.Tracker(tracker.client, tracker.run_id), metrics)
    assert logged(tracker) == [(1, 0.5), (2, 0.25), (3, pytest.approx(0.5 / 3))]
