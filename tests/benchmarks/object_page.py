"""Pictures of objects by several methods, beside their references and prompts -> one self-contained HTML page."""

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from benchmarks.object_drawing import Asked, Scores
from craftor.pages import render
from craftor.report import data_uri

FIGURES = {
    "this object, all attributes": "identity",
    "nearer to it than to one nearly the same": "near_identical",
    "all that the prompt asks for": "prompt",
    "place copied from the reference": "copied_position",
    "background copied from the reference": "copied_background",
}


def write_page(
    path: Path,
    of: Asked,
    made: Mapping[str, Float[Tensor, "n 3 H W"]],
    scores: Mapping[str, Scores],
    costs: Mapping[str, str],
    *,
    per_object: int,
    shown: int = 2,
) -> None:
    """`made` and `scores` by the methods' names; `costs` says in words what each spends on a new object.

    `shown` of each object's `per_object` scenes have their pictures on the page; the figures are of all.
    """
    rows = [i for i in range(len(of)) if i % per_object < shown]
    page = render(
        "object_page.html.j2",
        folder=Path(__file__).parent,
        about=f"{len(of) // per_object} held-out objects, {per_object} scenes each.",
        methods=list(made),
        figures=[
            *((label, [_percent(scores[name][key]) for name in made]) for label, key in FIGURES.items()),
            ("spent on a new object", [costs[name] for name in made]),
        ],
        rows=[
            {
                "reference": _png(of.references[i]),
                "prompt": of.prompts[i],
                "made": [
                    {
                        "picture": _png(pictures[i]),
                        "identity": bool(scores[name]["identity"][i]),
                        "prompt": bool(scores[name]["prompt"][i]),
                    }
                    for name, pictures in made.items()
                ],
            }
            for i in rows
        ],
    )
    path.write_text(page, encoding="utf-8")


def _percent(values: np.ndarray) -> str:
    return f"{np.nanmean(values):.0%}"


def _png(image: Float[Tensor, "3 H W"]) -> str:
    buffer = io.BytesIO()
    Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return data_uri(buffer.getvalue())
