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


def test_the_password_of_a_server_is_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = "http://me:p@ss@127.0.0.1:9"
    told = f"API request to {uri}/{'x' * 200} failed"
    with pytest.raises(tracking.TrackingUnreachable) as first, tracking.answering(MlflowClient(uri)):
        raise MlflowException(told)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(tracking.TrackingUnreachable) as second:
        tracking.client(tmp_path)
    for error in (first, second):
        assert "MLflow at http://127.0.0.1:9 refused or did not answer" in str(error.value)
        assert "ss@" not in str(error.value) and "me:" not in str(error.value)


def test_each_folder_of_runs_has_its_own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracking.client(tmp_path / "first").create_registered_model("mine")
    assert not tracking.client(tmp_path / "second").search_registered_models()


def test_a_run_that_is_not_known_is_told_from_a_server_that_cannot_say(
    tracker: tracking.Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk or a fault of the server's must not begin a second run; and what it says may hold a password."""
    assert tracking.Tracker.again(tracker.client, "0" * 32) is None
    known = tracking.Tracker.again(tracker.client, tracker.run_id)
    assert known is not None and known.run_id == tracker.run_id

    def fail(_: str) -> None:
        raise MlflowException("API request to https://me:hunter2@host/api failed\nwith a page more")

    monkeypatch.setattr(tracker.client, "get_run", fail)
    with pytest.raises(tracking.TrackingUnreachable) as error:
        tracking.Tracker.again(tracker.client, tracker.run_id)
    assert str(error.value) == ("MLflow did not say whether it knows the run: API request to https://host/api failed")
