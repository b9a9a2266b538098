"""The quickstart itself at reduced size, from a wheel in an empty environment outside the repository."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMALL = ["workers.num=1", "run.num_steps=3", "run.batch_size=4", "evaluation.num_prompts=6", "run.checkpoint_every=2"]
METRICS = {
    *("clip", "aesthetic", "preference", "total", "quality", "accuracy", "diversity"),
    *("count", "shape", "colour", "size", "position", "background", "texture"),
}

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("elsewhere")


@pytest.fixture(scope="module")
def python(folder: Path) -> Path:
    """Of an environment with the wheel alone; its dependencies come from this environment, by a path file."""
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)],
        check=True,
        capture_output=True,
    )
    environment = folder / "venv"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    (wheel,) = folder.glob("*.whl")
    site = next((environment / "lib").glob("python*/site-packages"))
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel], check=True)
    dependencies = [p for p in sys.path if p.endswith("site-packages")]
    (site / "dependencies.pth").write_text("\n".join(dependencies))
    where = subprocess.run(
        [python, "-c", "import craftor, craftor_micro, craftor_rewards; print(craftor.__file__)"],
        capture_output=True,
        text=True,
        check=True,
        cwd=folder,
    )
    assert str(site) in where.stdout
    return python


def test_an_installed_wheel_makes_a_whole_report(python: Path, folder: Path) -> None:
    changes = [argument for change in SMALL for argument in ("--set", change)]
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
    done = subprocess.run(
        [python, "-m", "craftor", "quickstart", *changes],
        cwd=folder,
        env=clean,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "registered in MLflow: models:/micro-textcraftor/1" in done.stdout
    report = json.loads((folder / "runs" / "quickstart" / "report.json").read_text())
    assert set(report["metrics"]) == METRICS
    for metric in report["metrics"].values():
        assert {"base", "tuned", "delta", "ci95", "win_rate", "held_out"} <= set(metric)
    held_out = {name for name, metric in report["metrics"].items() if metric["held_out"]}
    assert held_out == METRICS - {"clip", "aesthetic", "total"}
    assert [point["weight"] for point in report["interpolation"]] == [0, 0.25, 0.5, 0.75, 1]
    assert report["registered"] == {"name": "micro-textcraftor", "version": "1"}
    run = folder / "runs" / "quickstart"
    images = [json.loads(line) for line in (run / "evaluation" / "images.jsonl").read_text().splitlines()]
    assert sum(image["variant"] == "base" for image in images) == 6 * 2
    for name in ("report.html", "report.png", "bundle/encoder.toml", "bundle/text_encoder/model.safetensors"):
        assert (run / name).stat().st_size > 0
