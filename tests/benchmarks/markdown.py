"""`python -m benchmarks.markdown NAME`: `runs/bench/NAME.json` as tables of the README, between their markers."""

import json
import sys
from collections.abc import Callable, Mapping

from benchmarks.harness import OUT, ROOT


def main() -> None:
    (name,) = sys.argv[1:]
    record = json.loads((OUT / f"{name}.json").read_text())
    text = f"{TITLES[name]}\n\n{figures(name, record['figures'])}\n{EXTRA.get(name, _nothing)(record['details'])}"
    begin, end = f"<!-- bench-{name}:begin -->", f"<!-- bench-{name}:end -->"
    readme = ROOT / "README.md"
    before, found, rest = readme.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{readme} has no {begin} … {end}")
    readme.write_text(f"{before}{begin}\n{machine(name, record)}\n{text}\n{end}{after}")


def machine(name: str, record: Mapping) -> str:
    own = record["machine"]
    cores = f"{own['cores']} cores, {own['memory_gib']:.0f} GiB"
    return f"From `make bench-{name}` ({record['seconds'] / 60:.0f} minutes) on {own['cpu']}, {cores}."


def figures(name: str, found: Mapping[str, float]) -> str:
    rows = [f"| {meaning} | {found[key]:{form}} | {aim} |" for key, (meaning, form, aim) in FIGURES[name].items()]
    return "\n".join(["| | measured | aim |", "|---|---|---|", *rows])


def replays(details: Mapping) -> str:
    """Speed against memory, by window and how much of it is replayed."""
    rows = [
        f"| {setting} | {1e3 * own['cpu_seconds']:.0f} | {own['peak']:.0f} | {own['total']:.0f} |"
        for setting, own in details["memory"].items()
    ]
    head = ["", "| window K of 25, graphs | ms a step | MiB added by steps | MiB in all |", "|---|---|---|---|"]
    return "\n".join([*head, *rows])


def _nothing(details: Mapping) -> str:
    return ""


TITLES = {
    "train": "One thread, fp32, medians of 20 steps; of two models, tiny and micro, the worse.",
    "rewards": "The micro recipe's step with its rewards in the trainer, and as Ray actors.",
}
FIGURES: dict[str, dict[str, tuple[str, str, str]]] = {
    "train": {
        "floor_ratio": ("step over the sum of the network calls it cannot avoid", ".3f", "≤ 1.05"),
        "speedup_in_worker": ("images/s over the paper's procedure, prefix in the worker", ".2f", "≥ 1.3"),
        "speedup_cached": ("the same, prefix from the cache", ".2f", "≥ 2.5"),
        "speedup_trl_lora": ("images/s over TRL 0.23.1's AlignProp, LoRA", ".2f", "≥ 1.25"),
        "speedup_trl_unet": ("the same, whole UNet", ".2f", "≥ 1.25"),
        "gradient_difference": ("distance of gradients where the mathematics is the same, relative", ".0e", "≤ 1e-5"),
        "memory_k20_over_k1": ("peak resident memory, window 20 over window 1, replayed", ".2f", "≤ 1.15"),
        "memory_added_k20_over_k1": ("the same, without what the process held before its first step", ".2f", ""),
    },
    "rewards": {
        "gradient_error_actors": ("largest difference of gradients, relative", ".0e", "≤ 1e-5"),
        "step_seconds_inline": ("seconds a step, inline", ".3f", ""),
        "step_seconds_actors": ("seconds a step, actors", ".3f", ""),
        "bytes_per_image": ("bytes moved per image and reward", ".0f", ""),
    },
}
"""By benchmark and key: what the figure is, its format and what was aimed at."""
EXTRA: dict[str, Callable[[Mapping], str]] = {"train": replays}


if __name__ == "__main__":
    main()
