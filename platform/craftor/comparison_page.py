"""A comparison -> `compare.html`, contact sheets, `compare.md`, `compare.json` and the blind page."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from craftor import blind, contact
from craftor.comparison import BASE, Comparison, as_json, compare, markdown
from craftor.evaluation_summary import DETAILS
from craftor.pages import render
from craftor.report import data_uri
from craftor.run_files import write_json
from craftor.statistics import decimals
from craftor.verdict import interval, number, ordered


def write_comparison(folders: Sequence[Path], out: Path) -> list[Path]:
    """Compare evaluated runs and render it to `out`; returns the files. Raises EvaluationError, see `compare`."""
    comparison = compare(folders)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "compare.json", as_json(comparison))
    (out / "compare.md").write_text(markdown(comparison) + "\n", encoding="utf-8")
    sheets = contact.save_sheets(out, comparison.variants, _strips(comparison))
    paths = [out / "compare.html", out / "compare.json", out / "compare.md", *sheets]
    if sheets:
        paths.append(blind.write_page(out / "blind.html", comparison))
    paths[0].write_text(_page(comparison, sheets), encoding="utf-8")
    return paths


def _page(comparison: Comparison, sheets: Sequence[Path]) -> str:
    about = comparison.about
    rows = [_row(row, comparison) for row in _ordered(comparison.metrics)]
    return render(
        "compare.html.j2",
        variants=comparison.variants,
        groups=[
            ("Never trained on", [row for row in rows if row["held_out"] and row["name"] not in DETAILS]),
            ("Trained on, by one of them at least", [row for row in rows if not row["held_out"]]),
            ("Accuracy by attribute", [row for row in rows if row["name"] in DETAILS]),
        ],
        left_out=comparison.left_out,
        which=f"prompts of {suite}" if (suite := about["prompts"]["suite"]) else "held-out prompts",
        num_prompts=about["prompts"]["num"],
        num_seeds=about["num_seeds"],
        num_tests=sum(len(row["pairs"]) for row in comparison.metrics),
        sheets=[data_uri(sheet.read_bytes()) for sheet in sheets],
    )


def _row(row: dict[str, Any], comparison: Comparison) -> dict[str, Any]:
    digits = max(decimals(pair["ci95"]) for pair in row["pairs"])
    pairs = [
        {
            "text": number(pair["delta"], digits, sign=True),
            "interval": interval(pair["ci95"][0], pair["ci95"][1], digits),
            "wins": f"{pair['win_rate']:.0%}",
            "p": f"{pair['p_holm']:.2g}",
            "of": pair["of"],
            "over": pair["over"],
            "direction": ("up" if pair["delta"] > 0 else "down") if pair["p_holm"] < 0.05 else "",
        }
        for pair in row["pairs"]
    ]
    return {
        "name": row["metric"],
        "held_out": row["held_out"],
        "means": [number(row["means"][variant]["mean"], digits) for variant in comparison.variants],
        "over_base": [pair for pair in pairs if pair["over"] == BASE],
        "between": [pair for pair in pairs if pair["over"] != BASE],
    }


def _ordered(metrics: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Most telling first, as in a report."""
    return list(ordered({row["metric"]: row for row in metrics}).values())


def _strips(comparison: Comparison) -> list[contact.Strip]:
    """The kept pictures of every prompt's first seed."""
    strips = []
    for image in next(iter(comparison.runs.values())).images:
        if (image["seed"], image["variant"]) != (0, "base"):
            continue
        found = [comparison.picture(variant, image["number"], 0) for variant in comparison.variants]
        if all(found):
            pictures = [Image.open(io.BytesIO(png)) for png in found if png]
            strips.append(contact.Strip(image["prompt"], pictures))
    return strips
