"""Evaluation metrics -> words: what may honestly be said about a run, by what each metric proves."""

from craftor.statistics import decimals, excludes_zero

ATTRIBUTES = ("count", "shape", "colour", "size", "position", "background", "texture")
_MEASURED = ("quality", "accuracy", "diversity")
UNITS = {"quality": "of 10"}


def kind(name: str, row: dict) -> str:
    """`judge`: never trained on; `detail`: a part of accuracy; `trained`: what the optimiser was asked for."""
    if name in ATTRIBUTES:
        return "detail"
    return "judge" if row["held_out"] else "trained"


def ordered(metrics: dict[str, dict]) -> dict[str, dict]:
    """The same metrics, most telling first: quality, held-out rewards, accuracy, diversity; then what was trained."""
    ranks = {"quality": 0, "accuracy": 2, "diversity": 3, "total": 4}
    default = {"judge": 1, "trained": 5, "detail": 6}
    return dict(sorted(metrics.items(), key=lambda item: ranks.get(item[0], default[kind(*item)])))


def verdict(report: dict) -> str:
    """One sentence on what was not trained on: quality, held-out rewards, accuracy; failing those, the first metric."""
    metrics = ordered(report["metrics"])
    judges = [name for name, row in metrics.items() if kind(name, row) == "judge" and name != "diversity"]
    told, rewards = judges or list(metrics)[:1], [name for name in judges if name not in _MEASURED]
    clauses = "; ".join(_clause(name, metrics[name], held_out=name in rewards) for name in told)
    seeds = f"{report['num_seeds']} seed" + ("s" if report["num_seeds"] != 1 else "")
    return f"On {report['num_prompts']} held-out prompts × {seeds}, {clauses}."


def caution(metrics: dict[str, dict]) -> str | None:
    """A rise of the trained reward that the independent measures do not share is said out loud."""
    if "total" not in metrics or metrics["total"]["ci95"][0] <= 0:
        return None
    fell = [name for name, row in metrics.items() if kind(name, row) == "judge" and row["ci95"][1] < 0]
    if fell == ["diversity"]:
        return "The trained reward rose and diversity fell: the images have become more alike."
    if fell:
        return f"The trained reward rose while {' and '.join(fell)} fell: part of the gain is not real."
    if "quality" in metrics and not excludes_zero(metrics["quality"]["ci95"]):
        return "The trained reward rose without a measurable gain in quality."
    return None


def number(value: float, digits: int, *, sign: bool = False) -> str:
    """Fixed decimals, a real minus sign, and no negative zero."""
    return f"{round(value, digits) + 0.0:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def interval(low: float, high: float, digits: int) -> str:
    return f"[{number(low, digits)}, {number(high, digits)}]"


def _clause(name: str, row: dict, *, held_out: bool) -> str:
    (low, high), digits = row["ci95"], decimals(row["ci95"])
    unit = f" {UNITS[name]}" if name in UNITS else ""
    label = f"the held-out reward {name}" if held_out else name
    if low > 0:
        return f"{label} rose by {number(row['delta'], digits)} {interval(low, high, digits)}{unit}"
    if high < 0:
        return f"{label} fell by {number(-row['delta'], digits)} {interval(-high, -low, digits)}{unit}"
    change = number(row["delta"], digits, sign=True)
    return f"{label} did not measurably change ({change} {interval(low, high, digits)}{unit})"


def markdown(report: dict) -> str:
    """The metrics as a Markdown table, for a README."""
    lines = ["| metric | base | tuned | change [95 % interval] | wins | |", "|---|---|---|---|---|---|"]
    for name, row in ordered(report["metrics"]).items():
        places = decimals(row["ci95"])
        low, high = row["ci95"]
        mark = "never trained on" if row["held_out"] else "trained"
        lines.append(
            f"| {name} | {row['base']:.{places}f} | {row['tuned']:.{places}f} | {row['delta']:+.{places}f} "
            f"[{low:+.{places}f}, {high:+.{places}f}] | {row['win_rate']:.0%} | {mark} |"
        )
    return "\n".join(lines)
