"""The report: one file that needs nothing else, says what the numbers say, and a poster of the promised size."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from craftor import figures
from craftor.report import write_report
from craftor.statistics import paired
from craftor.verdict import caution, number, ordered, verdict

HOSTILE = 'a ring <script>alert("x")</script> & $5 http'


def metric(delta: float, *, held_out: bool = False, noise: float = 0.1) -> dict:
    generator = np.random.default_rng(0)
    base = generator.normal(5, 1, size=(50, 2))
    return {**paired(base, base + delta + generator.normal(0, noise, size=(50, 2))), "held_out": held_out}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    images = tmp_path / "evaluation" / "samples"
    images.mkdir(parents=True)
    samples = []
    for index, prompt in enumerate((HOSTILE, "two stars")):
        for name in ("base", "tuned", "w0", "w1"):
            Image.new("RGB", (64, 64), (40 * index, 90, 200)).save(images / f"{index}_{name}.png")
        strip = [f"samples/{index}_w0.png", f"samples/{index}_w1.png"] if index == 0 else None
        paths = {side: f"samples/{index}_{side}.png" for side in ("base", "tuned")}
        samples.append({"prompt": prompt, "seed": 0, **paths, "strip": strip})
    (tmp_path / "evaluation" / "samples.json").write_text(json.dumps(samples))
    report = {
        "name": "tiny <run>",
        "metrics": {
            "clip": metric(0.5),
            "total": metric(0.6),
            "hps": metric(0.3, held_out=True),
            "quality": metric(0.91),
            "accuracy": metric(0.0),
            "shape": metric(0.0),
        },
        "interpolation": [{"weight": w, "reward": 2 + w, "quality": 5 + w, "accuracy": 0.9} for w in (0, 1)],
        "registered": None,
        "train_seconds": 75.2,
        "peak_rss_gib": 2.3,
        "num_prompts": 50,
        "num_seeds": 2,
        "machine": "two cores",
        "command": "craftor train recipes/tiny.toml --set a='<b>'",
    }
    (tmp_path / "report.json").write_text(json.dumps(report))
    steps = [{"step": s, "loss": -s, "total": s, "clip": s / 2, "grad_norm": 1.0, "drift": 0.1} for s in range(1, 30)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (tmp_path / "recipe.toml").write_text('name = "tiny"  # <kept> verbatim\n')
    return tmp_path


def test_page_is_one_file_and_escapes_what_it_shows(run_dir: Path) -> None:
    page, _ = write_report(run_dir)
    html = page.read_text()
    assert "http://" not in html and "https://" not in html and "<script" not in html
    assert "a ring &lt;script&gt;" in html and "# &lt;kept&gt; verbatim" in html and "tiny &lt;run&gt;" in html
    sources = re.findall(r'(?:src|srcset|href)="([^"]*)"', html)
    # Two pairs, one strip of two, and total, clip, grad_norm, drift in two themes.
    assert len(sources) == 4 + 2 + 4 * 2
    assert all(source.startswith("data:image/png;base64,") for source in sources)


def test_page_shows_the_numbers(run_dir: Path) -> None:
    html = write_report(run_dir)[0].read_text()
    quality = json.loads((run_dir / "report.json").read_text())["metrics"]["quality"]
    for key in ("base", "tuned"):
        assert f"<td>{quality[key]:.3f}</td>" in html
    assert f"+{quality['delta']:.3f}" in html
    assert html.index("Never trained on") < html.index("Trained on") < html.index("Accuracy by attribute")
    assert 'class="held"' in html and "1 min 15 s" in html and "not registered" in html


def test_poster_has_its_size(run_dir: Path) -> None:
    _, picture = write_report(run_dir)
    with Image.open(picture) as image:
        image.load()
        assert image.size == figures.POSTER_SIZE


def test_a_run_without_interpolation_curves_or_spread(run_dir: Path) -> None:
    report = json.loads((run_dir / "report.json").read_text())
    report["interpolation"] = []
    for row in report["metrics"].values():
        del row["spread"]
    (run_dir / "report.json").write_text(json.dumps(report))
    (run_dir / "metrics.jsonl").write_text("")
    samples = [{**s, "strip": None} for s in json.loads((run_dir / "evaluation" / "samples.json").read_text())]
    (run_dir / "evaluation" / "samples.json").write_text(json.dumps(samples))
    page, picture = write_report(run_dir)
    assert "From base to tuned" not in page.read_text() and picture.exists()


def row(delta: float, low: float, high: float, *, held_out: bool = False) -> dict:
    return {"base": 5.0, "tuned": 5 + delta, "delta": delta, "ci95": [low, high], "win_rate": 0.5, "held_out": held_out}


def test_verdict_says_what_is_sure_and_what_is_not() -> None:
    metrics = {
        "quality": row(0.91, 0.85, 0.97, held_out=True),
        "accuracy": row(0.003, -0.015, 0.02, held_out=True),
        "hps": row(-1, -1.2, -0.8, held_out=True),
    }
    assert verdict({"metrics": metrics, "num_prompts": 200, "num_seeds": 2}) == (
        "On 200 held-out prompts × 2 seeds, quality rose by 0.91 [0.85, 0.97] of 10; "
        "the held-out reward hps fell by 1.00 [0.80, 1.20]; "
        "accuracy did not measurably change (+0.003 [−0.015, 0.020])."
    )


def test_verdict_without_a_judge_speaks_of_the_total() -> None:
    said = verdict({"metrics": {"clip": row(1, 0.9, 1.1), "total": row(2, 1.9, 2.1)}, "num_prompts": 2, "num_seeds": 1})
    assert said == "On 2 held-out prompts × 1 seed, total rose by 2.00 [1.90, 2.10]."


def test_caution_where_the_gain_is_not_shared() -> None:
    total = row(1, 0.9, 1.1)
    sure, fell, unsure = (row(*of, held_out=True) for of in ((1, 0.9, 1.1), (-1, -1.1, -0.9), (0.1, -0.1, 0.3)))
    assert caution({"total": total, "quality": sure}) is None
    assert caution({"total": row(0.1, -0.1, 0.3), "quality": fell}) is None
    assert caution({"total": total, "accuracy": row(-1, -1.1, -0.9)}) is None, "an oracle trained it: no witness"
    assert "quality fell" in (caution({"total": total, "quality": fell}) or "")
    assert "more alike" in (caution({"total": total, "quality": sure, "diversity": fell}) or "")
    assert "without a measurable gain" in (caution({"total": total, "quality": unsure}) or "")


def test_order_puts_independent_measures_first() -> None:
    names = ("shape", "clip", "total", "diversity", "accuracy", "quality")
    measured = ("diversity", "accuracy", "quality")
    metrics = {name: row(0, -1, 1, held_out=name in (*measured, "hps")) for name in (*names, "hps")}
    assert list(ordered(metrics)) == ["quality", "hps", "accuracy", "diversity", "total", "clip", "shape"]


def test_numbers_have_no_negative_zero() -> None:
    assert number(-0.0001, 2, sign=True) == "+0.00" and number(-1.5, 1) == "−1.5"


def test_smoothing_keeps_length_and_constants() -> None:
    for length in (1, 2, 5, 400):
        smoothed = figures.smooth(np.full(length, 3.0))
        assert len(smoothed) == length
        assert np.allclose(smoothed, 3.0)
