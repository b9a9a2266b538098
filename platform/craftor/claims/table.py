"""`claims.json` -> Markdown; and what testing the claims will take, before it is begun."""

from collections.abc import Mapping
from typing import Any

from craftor.claims.declared import Claim
from craftor.claims.grid import cells
from craftor.claims.methods import FEW_PROMPTS, IMAGES, METHODS, NUM_POINTS, Budget
from craftor.claims.testing import images_of, methods_of
from craftor.statistics import decimals
from craftor.verdict import interval, number

START_TRAINING, START_EVALUATION, SECONDS_PER_IMAGE = 20.0, 15.0, 0.06
"""On two cores, as measured."""


def markdown(found: Mapping[str, Any]) -> str:
    """A row a claim: what is said, the leading effect, the verdict with what stands against it, the command."""
    lines = ["| claim | effect [95 % interval] | verdict | command |", "|---|---|---|---|"]
    for row in found["claims"]:
        if row["ci95"] is None:
            shown, verdict = "", f"**undecided**: {row['reason']}"
        else:
            shown = f"{row['of']}: {_shown(row)}"
            verdict = f"**{row['verdict']}**" + _against(row)
        lines.append(f"| {row['id']} {row['claim']} | {shown} | {verdict} | `{row['command']}` |")
    return "\n".join(lines)


def _against(row: Mapping[str, Any]) -> str:
    """The parts that keep a claim from holding."""
    said = [f"{part['said']} {_shown(part)}" for part in row["parts"] if part["verdict"] not in (None, "holds")]
    return f": {'; '.join(said)}" if said else ""


def _shown(row: Mapping[str, Any]) -> str:
    """An effect and its interval."""
    low, high = row["ci95"]
    digits = decimals(row["ci95"])
    return f"{number(row['effect'], digits, sign=True)} {interval(low, high, digits)}"


def costs(claims: Mapping[str, Claim], budget: Budget) -> list[dict[str, Any]]:
    """Estimated seconds by claim: all that it needs, and what is not shared with a claim before it."""
    done: set[tuple[Any, ...]] = set()
    rows = []
    for name, claim in claims.items():
        needed: dict[tuple[Any, ...], float]
        needed = {("train", method): _training(method, budget) for method in methods_of(images_of(claim))}
        needed |= {("evaluate", images): _evaluation(images, budget) for images in images_of(claim)}
        # Images are made together: the base's, and starting, once for each training seed.
        needed |= {("start",): _start(budget)} if images_of(claim) else {}
        methods = methods_of(images_of(claim))
        of_one_seed = [method for method in claim.grid if method not in methods]
        needed |= {("grid", method): _training(method, budget) / budget.num_seeds for method in of_one_seed}
        needed |= {("grown", method): (NUM_POINTS - 1) * budget.num_seeds * _few(budget) for method in claim.curves}
        needed |= {("start grown",): budget.num_seeds * START_EVALUATION} if claim.curves else {}
        needed |= {("cell", cell.method, cell.used): _few(budget) for cell in cells(claim.grid)}
        rows.append(
            {"id": name, "methods": [*methods, *of_one_seed]}
            | {"seconds": sum(needed.values())}
            | {"more": sum(seconds for key, seconds in needed.items() if key not in done)}
        )
        done |= needed.keys()
    return rows


def _training(method: str, budget: Budget) -> float:
    steps = budget.steps_of(method) * METHODS[method].seconds * budget.batch_size / 16
    return budget.num_seeds * (START_TRAINING + steps / max(1, budget.workers))


def _evaluation(images: str, budget: Budget) -> float:
    strips = 3 * min(IMAGES[images].num_strips, budget.num_prompts)
    return budget.num_seeds * SECONDS_PER_IMAGE * (budget.num_prompts * budget.num_images + strips)


def _start(budget: Budget) -> float:
    return budget.num_seeds * (START_EVALUATION + SECONDS_PER_IMAGE * budget.num_prompts * budget.num_images)


def _few(budget: Budget) -> float:
    """Of a checkpoint's images, or a cell's."""
    return SECONDS_PER_IMAGE * min(FEW_PROMPTS, budget.num_prompts)
