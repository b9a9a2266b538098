"""Runs in MLflow: parameters, metrics as they come, artifacts; and patience when the server goes away.

`metrics.jsonl` in the run's folder is the truth; MLflow is fed from it. If the server is unreachable at the start, the
run does not start; if it goes away later, lines wait here and are sent when it is back, at the latest by `sync`.
"""

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import mlflow
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelOutput, Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from craftor.prompts import Prepared
from craftor.recipe import Recipe

EXPERIMENT = "craftor"
_SEND_EVERY_SECONDS, _RETRY_SECONDS = 5.0, 30.0


class TrackingUnreachable(RuntimeError):
    """The MLflow server does not answer; the message names it and what to do."""


def client(runs_root: Path) -> MlflowClient:
    """A client for `MLFLOW_TRACKING_URI`, by default an SQLite file beside the runs. Raises TrackingUnreachable."""
    # The default of seven retries with backoff would hold a run up for minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{runs_root.resolve() / 'mlflow.db'}"
    _use(uri)
    connected = MlflowClient(uri)
    try:
        if connected.get_experiment_by_name(EXPERIMENT) is None:
            local = uri.startswith("sqlite:")
            connected.create_experiment(
                EXPERIMENT, artifact_location=(runs_root.resolve() / "mlartifacts").as_uri() if local else None
            )
    except MlflowException as error:
        raise TrackingUnreachable(
            f"MLflow at {without_secrets(uri)} refused or did not answer ({reason(error)}); start it, log in by "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or unset MLFLOW_TRACKING_URI to use a local file"
        ) from None
    return connected


def _use(uri: str) -> None:
    """Make a store MLflow's current one, without the environment variable that it would leave for the next call."""
    given = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)
    if not given:
        os.environ.pop("MLFLOW_TRACKING_URI", None)


@contextmanager
def answering(connected: MlflowClient) -> Iterator[None]:
    """Whatever MLflow raises in the block becomes TrackingUnreachable with its reason: no answer, no permission."""
    try:
        yield
    except MlflowException as error:
        where = without_secrets(connected.tracking_uri)
        raise TrackingUnreachable(f"MLflow at {where} refused or did not answer: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """The first line of what it says, for anybody to read."""
    return without_secrets(str(error).partition("\n")[0])[:200]


def without_secrets(text: str) -> str:
    """URLs in it lose their user and password."""
    return re.sub(r"//[^/\s]+@", "//", text)


class Tracker:
    """One MLflow run; `log` never raises when the server is away, and sends nothing twice."""

    def __init__(self, connected: MlflowClient, run_id: str) -> None:
        self.client, self.run_id = connected, run_id
        self.known = {point.step for point in connected.get_metric_history(run_id, "loss")}
        self.waiting: list[Metric] = []
        self.send_at = 0.0
        self.outage: str | None = None

    @classmethod
    def start(
        cls,
        connected: MlflowClient,
        recipe: Recipe,
        prepared: Prepared | None,
        *,
        name: str | None = None,
        parent: str | None = None,
    ) -> "Tracker":
        """Create the run, or a child of the run `parent`, with the resolved recipe and its prompts' digest, if any."""
        experiment = connected.get_experiment_by_name(EXPERIMENT)
        assert experiment is not None
        tags = {MLFLOW_PARENT_RUN_ID: parent} if parent else {}
        run_id = connected.create_run(experiment.experiment_id, run_name=name or recipe.name, tags=tags).info.run_id
        flat = _flatten(recipe.model_dump(by_alias=True))
        parameters = [Param(key.replace("*", "each"), str(value)[:500]) for key, value in flat]  # MLflow allows no *
        connected.log_batch(run_id, params=parameters)
        connected.log_dict(run_id, recipe.model_dump(by_alias=True), "recipe.json")
        if prepared is not None:
            connected.log_inputs(run_id, [_dataset(recipe, prepared)])
        return cls(connected, run_id)

    @classmethod
    def again(cls, connected: MlflowClient, run_id: str) -> "Tracker | None":
        """The run that an earlier process began, if this store knows it: that process may have had another."""
        try:
            connected.get_run(run_id)
        except MlflowException as error:
            # A server that guards its runs does not even say which ones there are.
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "PERMISSION_DENIED"):
                raise TrackingUnreachable(f"MLflow did not say whether it knows the run: {reason(error)}") from error
            return None
        return cls(connected, run_id)

    def log(self, record: dict[str, float]) -> None:
        """Queue one line of `metrics.jsonl`; every few seconds, send what waits."""
        step = int(record["step"])
        if step in self.known:
            return
        self.known.add(step)
        now = int(time.time() * 1000)
        self.waiting += [Metric(name, float(value), now, step) for name, value in record.items() if name != "step"]
        if time.monotonic() >= self.send_at:
            sent = self.flush()
            self.send_at = time.monotonic() + (_SEND_EVERY_SECONDS if sent else _RETRY_SECONDS)

    def flush(self) -> bool:
        """Send what waits; False, with `outage` saying why, when the server does not answer."""
        while self.waiting:
            head = self.waiting[:900]  # MLflow takes at most 1000 metrics in one call
            try:
                self.client.log_batch(self.run_id, metrics=head)
            except MlflowException as error:
                self.outage = reason(error)
                return False
            del self.waiting[: len(head)]
        self.outage = None
        return True

    @contextmanager
    def reachable(self) -> Iterator[None]:
        """Send what waits, then run the block; any failure to reach the server becomes TrackingUnreachable."""
        if not self.flush():
            raise TrackingUnreachable(f"MLflow went away ({self.outage})")
        try:
            yield
        except MlflowException as error:
            raise TrackingUnreachable(f"MLflow went away ({reason(error)})") from error

    def artifacts(self, folder: Path, path: str) -> None:
        if folder.is_dir():
            self.client.log_artifacts(self.run_id, str(folder), path)
        else:
            self.client.log_artifact(self.run_id, str(folder), path)

    def scores(self, metrics: dict[str, dict]) -> None:
        """Held-out figures as `held_out/NAME/base`, `/tuned` and `/delta`."""
        now = int(time.time() * 1000)
        points = [
            Metric(f"held_out/{name}/{key}", row[key], now, 0)
            for name, row in metrics.items()
            for key in ("base", "tuned", "delta")
        ]
        self.client.log_batch(self.run_id, metrics=points)

    def figures(self, values: dict[str, float], step: int = 0) -> None:
        """Figures that are no line of `metrics.jsonl`, at once."""
        now = int(time.time() * 1000)
        self.client.log_batch(self.run_id, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    def output(self, model_id: str, step: int) -> None:
        """Tie a logged model to the run that made it."""
        self.client.log_outputs(self.run_id, [LoggedModelOutput(model_id, step)])

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED") -> None:
        self.client.set_terminated(self.run_id, status)


def _dataset(recipe: Recipe, prepared: Prepared) -> DatasetInput:
    return DatasetInput(
        Dataset(
            name=Path(recipe.data.path.removeprefix("micro:")).name,
            digest=prepared.digest[:16],
            source_type="local",
            source=json.dumps({"uri": recipe.data.path, "sha256": prepared.digest}),
            profile=json.dumps({"num_rows": prepared.num_rows, "num_truncated": prepared.num_truncated}),
        ),
        tags=[InputTag("mlflow.data.context", "training")],
    )


def differences(there: Recipe, here: Recipe) -> list[str]:
    """`key: there, here` for every key of two recipes that differs."""
    first, second = (dict(_flatten(recipe.model_dump(by_alias=True))) for recipe in (there, here))
    keys = [key for key in {**first, **second} if first.get(key) != second.get(key)]
    return [f"{key}: there {first.get(key)}, here {second.get(key)}" for key in keys]


def _flatten(data: dict, prefix: str = "") -> list[tuple[str, object]]:
    pairs: list[tuple[str, object]] = []
    for key, value in data.items():
        pairs += _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return pairs
