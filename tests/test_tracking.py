"""MLflow goes away during a run: training goes on, nothing is lost, nothing is sent twice."""

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


def test_what_mlflow_has_is_not_sent_again(tracker: tracking.Tracker) -> None:
    tracker.log({"step": 1, "loss": 0.5})
    tracker.flush()
    for _ in range(2):
        again = tracking.Tracker(tracker.client, tracker.run_id)
        for step in (1, 2, 3):
            again.log({"step": step, "loss": 0.5 / step})
        with again.reachable():
            pass
    assert logged(tracker) == [(1, 0.5), (2, 0.25), (3, pytest.approx(0.5 / 3))]


def test_each_folder_of_runs_has_its_own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracking.client(tmp_path / "first").create_registered_model("mine")
    assert not tracking.client(tmp_path / "second").search_registered_models()
