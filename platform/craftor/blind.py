"""Which of two pictures do people prefer: a page that does not say whose they are, and what the votes come to.

The page is one static file. Order, pairs and sides are drawn anew in each browser; votes leave it as a JSON file.
"""

import base64
import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from craftor.comparison import Comparison
from craftor.evaluation_files import EvaluationError
from craftor.pages import render

CHOICES = {"left": (1.0, 0.0), "tie": (0.5, 0.5), "right": (0.0, 1.0)}
"""What a choice gives to the left and to the right picture."""


class VotesError(ValueError):
    """A file of votes that the blind page did not write, or of another comparison."""


def write_page(path: Path, comparison: Comparison) -> Path:
    """`blind.html` with every kept picture of every variant. Raises EvaluationError where none was kept."""
    pictures = []
    for image in next(iter(comparison.runs.values())).images:
        if image["variant"] != "base":
            continue
        found = [comparison.picture(variant, image["number"], image["seed"]) for variant in comparison.variants]
        if all(found):
            shown = [f"data:image/png;base64,{base64.b64encode(png).decode()}" for png in found if png]
            pictures.append({k: image[k] for k in ("number", "seed", "prompt")} | {"shown": shown})
    if not pictures:
        raise EvaluationError("no prompt has a picture of every run; keep some by: craftor evaluate RUN --keep 16")
    sha256 = hashlib.sha256(json.dumps(pictures).encode()).hexdigest()
    data = {"comparison": sha256, "variants": comparison.variants, "pictures": pictures}
    path.write_text(render("blind.html.j2", data=data), encoding="utf-8")
    return path


def load_votes(paths: Sequence[Path]) -> dict[str, Any]:
    """The votes of one or several people on one comparison: `{"variants": [...], "votes": [...]}`.

    Raises VotesError for a file that is none of the blind page's, and for files of different comparisons.
    """
    found: dict[str, Any] = {}
    for path in paths:
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
            sha256, variants, votes = read["comparison"], read["variants"], read["votes"]
            for vote in votes:
                _check(vote, variants)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise VotesError(f"{path}: not a file of votes ({type(error).__name__}: {error})") from None
        if found and found["comparison"] != sha256:
            raise VotesError(f"{path}: votes on another comparison than {paths[0]}'s")
        seen = [(vote["number"], vote["seed"], *sorted((vote["left"], vote["right"]))) for vote in votes]
        if len(set(seen)) < len(seen):
            raise VotesError(f"{path}: two votes on the same pair of pictures")
        found = {"comparison": sha256, "variants": variants, "votes": [*found.get("votes", []), *votes]}
    if not found.get("votes"):
        raise VotesError(f"{', '.join(map(str, paths))}: no votes")
    return found


def tally(found: dict[str, Any]) -> list[dict[str, Any]]:
    """For each two variants that were compared, how often the later one won, ties half, and the 95 % interval.

    Wilson's interval over prompts: each has the mean of its votes, so more voters make a prompt's score surer and are
    not counted as more prompts.
    """
    results = []
    for over, of in combinations(found["variants"], 2):
        scores: dict[int, list[float]] = defaultdict(list)
        counts = dict.fromkeys(CHOICES, 0)
        for vote in found["votes"]:
            if {vote["left"], vote["right"]} == {over, of}:
                left, right = CHOICES[vote["choice"]]
                scores[vote["number"]].append(left if vote["left"] == of else right)
                counts[vote["choice"]] += 1
        if scores:
            rate = sum(sum(given) / len(given) for given in scores.values()) / len(scores)
            results.append(
                {"of": of, "over": over, "win_rate": rate, "ci95": wilson(rate, len(scores))}
                | {"num_prompts": len(scores), "num_votes": sum(counts.values()), "ties": counts["tie"]}
                | {"left": counts["left"], "right": counts["right"]}
            )
    return results


def wilson(rate: float, num: int, z: float = 1.959964) -> list[float]:
    """Interval of a proportion (Wilson 1927): honest for few and for unanimous votes."""
    middle = rate + z * z / (2 * num)
    half = z * math.sqrt(rate * (1 - rate) / num + z * z / (4 * num * num))
    return [max(0.0, (middle - half) / (1 + z * z / num)), min(1.0, (middle + half) / (1 + z * z / num))]


def _check(vote: dict[str, Any], variants: Sequence[str]) -> None:
    if vote["choice"] not in CHOICES:
        raise ValueError(f"choice is {vote['choice']!r}, allowed: {', '.join(CHOICES)}")
    if vote["left"] == vote["right"] or not {vote["left"], vote["right"]} <= set(variants):
        raise ValueError(f"{vote['left']!r} against {vote['right']!r}, allowed: two of {', '.join(variants)}")
    if not isinstance(vote["number"], int) or not isinstance(vote["seed"], int):
        raise ValueError("number and seed of a vote are whole numbers")
