"""A search in MLflow: a parent run, and below it a child run for each trial."""

import json
from pathlib import Path

from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from craftor.recipe import load
from craftor.run_files import METRICS, write_json
from craftor.searching.inputs import Shared
from craftor.searching.probe import SCORE, read
from craftor.searching.study import Study
from craftor.searching.tuning import trial_folder
from craftor.tracking import Tracker, TrackingUnreachable

RUN = "run.json"


class Children:
    """Trials as child runs; what a server that is away has missed is sent by a later `send`."""

    def __init__(self, connected: MlflowClient, parent: Tracker, study: Study, shared: Shared) -> None:
        self.client, self.parent, self.study, self.shared = connected, parent, study, shared
        self.outage: str | None = None

    def try_send(self, number: int) -> None:
        """Send a trial that has ended; a search does not end because MLflow is away."""
        try:
            self.send(number)
        except (MlflowException, TrackingUnreachable) as error:
            self.outage = str(error).splitlines()[0][:200]

    def send(self, number: int) -> None:
        """Its training line by line, its evaluations, how it ended; nothing twice."""
        folder = trial_folder(self.shared.folder, number)
        if not (folder / "recipe.toml").is_file():
            return
        note = json.loads((folder / RUN).read_text()) if (folder / RUN).exists() else {}
        trial = next(trial for trial in self.study.trials() if trial.number == number)
        if note.get("sent") == trial.state:
            return
        if "mlflow_run_id" not in note:
            recipe = load(folder / "recipe.toml")
            name = f"{recipe.name}/{number:03d}"
            child = Tracker.start(self.client, recipe, self.shared.prepared, name=name, parent=self.parent.run_id)
            note = {"mlflow_run_id": child.run_id}
            write_json(folder / RUN, note)
        child = Tracker(self.client, note["mlflow_run_id"])
        for line in _lines(folder / METRICS):
            child.log(line)
        with child.reachable():
            for line in read(folder):
                child.figures(
                    {f"search/{k}": v for k, v in line.items() if k not in ("step", SCORE)}, int(line["step"])
                )
            child.finish("FAILED" if trial.state == "failed" else "FINISHED")
        write_json(folder / RUN, {**note, "sent": trial.state})


def _lines(path: Path) -> list[dict[str, float]]:
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
