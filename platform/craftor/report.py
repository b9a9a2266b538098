"""A finished run's folder -> `report.html`, one self-contained page, and `report.png`, its best in one picture."""

import base64
import io
import json
from pathlib import Path

import numpy as np
from matplotlib.ticker import MaxNLocator
from PIL import Image

from craftor import figures
from craftor.console import rewards_of
from craftor.pages import render
from craftor.statistics import decimals, excludes_zero
from craftor.verdict import UNITS, caution, interval, kind, number, ordered, verdict

_KINDS = {"judge": "Never trained on", "trained": "Trained on", "detail": "Accuracy by attribute"}
_MAX_PAIRS, _MAX_STRIPS, _MAX_SIDE = 12, 6, 320
Series = tuple[str, np.ndarray, np.ndarray]


def write_report(run_dir: Path) -> tuple[Path, Path]:
    """Read `report.json`, `metrics.jsonl`, `recipe.toml` and `evaluation/samples.json`; returns both files' paths."""
    report = json.loads((run_dir / "report.json").read_text(encoding="utf-8"))
    report["metrics"] = ordered(report["metrics"])
    log = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    samples = json.loads((run_dir / "evaluation" / "samples.json").read_text(encoding="utf-8"))
    recipe = (run_dir / "recipe.toml").read_text(encoding="utf-8")
    page, picture = run_dir / "report.html", run_dir / "report.png"
    page.write_text(_page(report, log, samples, recipe, run_dir / "evaluation"), encoding="utf-8")
    _poster(picture, report, log, samples, run_dir / "evaluation")
    return page, picture


def _page(report: dict, log: list[dict], samples: list[dict], recipe: str, folder: Path) -> str:
    metrics = report["metrics"]
    strips = [sample for sample in samples if sample["strip"]][:_MAX_STRIPS]
    return render(
        "report.html.j2",
        report=report,
        verdict=verdict(report),
        caution=caution(metrics),
        pairs=[{**s, **{side: _uri(folder / s[side]) for side in ("base", "tuned")}} for s in samples[:_MAX_PAIRS]],
        num_samples=len(samples),
        groups=_groups(metrics),
        ticks=_ticks(metrics),
        strips=[{"prompt": s["prompt"], "images": [_uri(folder / image) for image in s["strip"]]} for s in strips],
        weights=[f"{point['weight']:g}" for point in report["interpolation"]],
        trends=[_trend(*series) for series in _interpolation(report["interpolation"])],
        curves=[_curve(*series) for series in _curves(log)],
        provenance=_provenance(report, log),
        recipe=recipe,
    )


def _poster(path: Path, report: dict, log: list[dict], samples: list[dict], folder: Path) -> None:
    """One picture per prompt, in the order of the file: nothing is picked by its result."""
    first = {sample["prompt"]: sample for sample in reversed(samples)}
    chosen = [sample for sample in samples if first[sample["prompt"]] is sample][: figures.NUM_PAIRS]
    effects = [effect for name, row in report["metrics"].items() if (effect := _effect(name, row))]
    curves = _curves(log)
    figures.poster(
        path,
        title=report["name"],
        verdict=" ".join(filter(None, (verdict(report), caution(report["metrics"])))),
        pairs=[figures.Pair(s["prompt"], _open(folder / s["base"]), _open(folder / s["tuned"])) for s in chosen],
        effects=[effect for effect in effects if effect.kind != "detail"],
        curve=curves[0] if curves else None,
        interpolation=_interpolation(report["interpolation"]),
    )


def _groups(metrics: dict[str, dict]) -> list[dict]:
    """Table rows by what they prove: what training never saw comes first."""
    rows = {title: [_row(n, r, metrics) for n, r in metrics.items() if kind(n, r) == k] for k, title in _KINDS.items()}
    return [{"title": title, "rows": group} for title, group in rows.items() if group]


def _row(name: str, row: dict, metrics: dict[str, dict]) -> dict:
    digits, effect, (left, right) = decimals(row["ci95"]), _effect(name, row), _extent(metrics)
    return {
        "name": name,
        "unit": UNITS.get(name, ""),
        "held_out": row["held_out"],
        "base": number(row["base"], digits),
        "tuned": number(row["tuned"], digits),
        "delta": number(row["delta"], digits, sign=True),
        "interval": interval(row["ci95"][0], row["ci95"][1], digits),
        "wins": f"{row['win_rate']:.0%}",
        "direction": ("up" if row["delta"] > 0 else "down") if excludes_zero(row["ci95"]) else "",
        "forest": [_percent(x, left, right) for x in (effect.low, effect.middle, effect.high)] if effect else None,
    }


def _effect(name: str, row: dict) -> figures.Effect | None:
    """The change in standard deviations of the base; None where the base does not vary or its spread is unknown."""
    if not (spread := row.get("spread")):
        return None
    low, high = row["ci95"]
    return figures.Effect(name, low / spread, row["delta"] / spread, high / spread, kind(name, row))


def _extent(metrics: dict[str, dict]) -> tuple[float, float]:
    """One axis for all rows, zero always on it, with room at both ends."""
    effects = [effect for name, row in metrics.items() if (effect := _effect(name, row))]
    low, high = min([0.0, *(e.low for e in effects)]), max([0.0, *(e.high for e in effects)])
    room = 0.06 * (high - low) or 1.0
    return low - room, high + room


def _ticks(metrics: dict[str, dict]) -> list[tuple[str, float]]:
    """Round numbers along the forest axis and where they stand, in percent."""
    low, high = _extent(metrics)
    inside = [x for x in MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(low, high) if low <= x <= high]
    return [(f"{x + 0.0:g}".replace("-", "−"), _percent(x, low, high)) for x in inside]


def _short(value: float) -> str:
    return f"{value:#.3g}".rstrip(".").replace("-", "−")


def _percent(x: float, low: float, high: float) -> float:
    return round(100 * (x - low) / (high - low), 2)


def _curves(log: list[dict]) -> list[Series]:
    """Total first, then each reward, then the health of the run; a metric that some lines lack is drawn where it is."""
    if not log:
        return []
    names = ["total" if "total" in log[0] else "loss", *rewards_of(log[0]), "grad_norm", "drift"]
    series = []
    for name in names:
        points = [(record["step"], record[name]) for record in log if name in record]
        if points:
            steps, values = np.array(points, dtype=np.float64).T
            series.append((name, steps, values))
    return series


def _curve(name: str, steps: np.ndarray, values: np.ndarray) -> dict:
    drawn = {t: data_uri(figures.curve(steps, values, getattr(figures, t.upper()))) for t in ("light", "dark")}
    return {"name": name.replace("_", " "), "last": _short(figures.smooth(values)[-1]), **drawn}


def _interpolation(points: list[dict]) -> list[Series]:
    weights = np.array([point["weight"] for point in points], dtype=np.float64)
    names = [n for n in ("reward", "quality", "accuracy") if points and all(p.get(n) is not None for p in points)]
    return [(name, weights, np.array([point[name] for point in points], dtype=np.float64)) for name in names]


def _trend(name: str, weights: np.ndarray, values: np.ndarray) -> dict:
    """A line whose points stand under the columns of the strips, with the numbers to print beneath it."""
    low, high = figures.limits(values)
    x = (np.arange(len(weights)) + 0.5) / len(weights)
    y = 0.88 - 0.76 * (values - low) / (high - low)
    return {
        "name": name,
        "points": [(round(100 * a, 2), round(100 * b, 2)) for a, b in zip(x, y, strict=True)],
        "labels": [_short(value) for value in values],
    }


def _provenance(report: dict, log: list[dict]) -> list[tuple[str, str]]:
    minutes, seconds = divmod(round(report["train_seconds"]), 60)
    registered = report["registered"]
    return [
        ("Registered", f"{registered['name']}, version {registered['version']}" if registered else "not registered"),
        ("Training", f"{len(log)} steps in " + (f"{minutes} min {seconds} s" if minutes else f"{seconds} s")),
        ("Peak memory", f"{report['peak_rss_gib']:.1f} GiB"),
        ("Machine", report["machine"]),
        ("Command", report["command"]),
    ]


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def _uri(path: Path) -> dict:
    """An image for the page, at most twice as large as shown; small ones are scaled up by the page."""
    image = _open(path)
    image.thumbnail((_MAX_SIDE, _MAX_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return {"uri": data_uri(buffer.getvalue()), "small": image.width <= _MAX_SIDE // 2}


def data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
