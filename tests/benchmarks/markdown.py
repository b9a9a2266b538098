"""`python -m benchmarks.markdown NAME`: `runs/bench/NAME.json` as tables of the README, between their markers.

With the name `claims`, the verdicts of `recipes/claims.json`.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from statistics import median

from benchmarks.harness import OUT, ROOT
from craftor.claims.table import markdown

CLAIMS = ROOT / "recipes" / "claims.json"


def main() -> None:
    (name,) = sys.argv[1:]
    if name == "claims":
        record = json.loads(CLAIMS.read_text())
        where = f"From `make claims` ({record['seconds'] / 60:.0f} minutes) on {record['machine']}."
        write("claims", f"{where}\n\n{markdown(record)}\n")
        return
    record = json.loads((OUT / f"{name}.json").read_text())
    text = f"{TITLES[name]}\n\n{figures(name, record['figures'])}\n{EXTRA.get(name, _nothing)(record['details'])}"
    write(f"bench-{name}", f"{machine(name, record)}\n{text}\n")


def write(name: str, text: str) -> None:
    """Put the text between the README's markers of this name."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    readme = ROOT / "README.md"
    before, found, rest = readme.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{readme} has no {begin} … {end}")
    readme.write_text(f"{before}{begin}\n{text}{end}{after}")


def machine(name: str, record: Mapping) -> str:
    own = record["machine"]
    cores = f"{own['cores']} core{'s' if own['cores'] > 1 else ''}, {own['memory_gib']:.0f} GiB"
    return f"From `make bench-{name}` ({record['seconds'] / 60:.0f} minutes) on {own['cpu']}, {cores}."


def figures(name: str, found: Mapping[str, float]) -> str:
    """A figure that was taken on two clocks has the processor's beside the wall's, the truer on a busy machine."""
    two = any(f"{key}_cpu" in found for key in FIGURES[name])
    rows = []
    for key, (meaning, form, aim) in FIGURES[name].items():
        processor = f"{found[f'{key}_cpu']:{form}}" if f"{key}_cpu" in found else ""
        rows.append(f"| {meaning} | {found[key]:{form}} |{f' {processor} |' if two else ''} {aim} |")
    head = "| | wall's clock | processor's | aim |\n|---|---|---|---|" if two else "| | measured | aim |\n|---|---|---|"
    return "\n".join([head, *rows])


def replays(details: Mapping) -> str:
    """Speed against memory, by window and how much of it is replayed."""
    rows = [
        f"| {setting} | {1e3 * own['cpu_seconds']:.0f} | {own['peak']:.0f} | {own['total']:.0f} |"
        for setting, own in details["memory"].items()
    ]
    head = ["", "| window K of 25, graphs | ms a step | MiB added by steps | MiB in all |", "|---|---|---|---|"]
    return "\n".join([*head, *rows])


def rates(details: Mapping) -> str:
    """Images a second at saturation, by workload and server."""
    names = ("continuous", "plain", "grouped", "compiled", "wide", "serial")
    size = {"grouped": details["batch_size_of_grouped"], "wide": details["batch_size_of_wide"]}
    title = {"continuous": "the engine", "plain": "the engine, not compiled", "serial": "one at a time"} | {
        k: f"batches of {v}" for k, v in size.items()
    }
    title["compiled"] = f"{title['grouped']}, compiled"
    rows = [
        f"| {workload} | {' | '.join(_spread(own[name]) if name in own else '' for name in names)} |"
        for workload, own in details["images_per_second"].items()
    ]
    head = [
        "",
        f"| images/s: median (least, most) | {' | '.join(map(title.get, names))} |",
        f"|{'---|' * (1 + len(names))}",
    ]
    return "\n".join([*head, *rows])


def _spread(found: Sequence[float]) -> str:
    return f"{median(found):.2f} ({min(found):.2f}, {max(found):.2f})"


def objects(details: Mapping) -> str:
    """What the method claims of an object encoder, with the paired difference and the verdict."""
    head = [
        "",
        "| claim | metric | encoder | other | difference [95 % interval] | verdict |",
        "|---|---|---|---|---|---|",
    ]
    rows = []
    for own in details["compared"]:
        if "verdict" not in own:
            continue
        if "reason" in own:
            rows.append(f"| {own['said']} | | | | | **{own['verdict']}**: {own['reason']} |")
            continue
        if "ci95" not in own:
            said = f"| {own['said']} | {own['metric'].replace('_', ' ')} | {own['encoder']:.3g} | {own['other']:.3g} "
            rows.append(f"{said}| | **{own['verdict']}** |")
            continue
        low, high = own["ci95"]
        change = f"{own['effect']:+.2f} [{low:+.2f}, {high:+.2f}]"
        said = f"| {own['said']} | {own['metric']} | {own['encoder']:.2f} | {own['other']:.2f} "
        rows.append(f"{said}| {change} | **{own['verdict']}** |")
    return "\n".join([*head, *rows])


def pairs(details: Mapping) -> str:
    """The ratios whose median the table has."""
    ratios = ", ".join(f"{ratio:.2f}" for ratio in sorted(details["weak_scaling_pairs"]))
    return f"\nOf two workers and one, {len(details['weak_scaling_pairs'])} pairs of runs in turn: {ratios}.\n"


def _nothing(details: Mapping) -> str:
    return ""


TITLES = {
    "train": "One thread, fp32, medians of 20 steps; of two models, tiny and micro, the worse.",
    "rewards": "The micro recipe's step with its rewards in the trainer, and as Ray actors.",
    "search": "`recipes/micro_search.toml`; gains in the true quality, on held-out prompts and fresh noise.",
    "scale": "The micro recipe, one thread a worker; prompts made by resampling the public sets.",
    "object": "Held-out objects, one reference each; judged by the identity scorer and the referee.",
    "serve": "The micro model in strict mode, in bf16 where the CPU multiplies it; client and server on this machine; "
    "medians over 3 seeds.",
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
    "search": {
        "minutes_16_trials": ("minutes for 16 trials", ".1f", "≤ 20"),
        "winner_gain": ("quality of the winner over the recipe's own weights", "+.3f", ""),
        "winner_gain_ci_low": ("the same, lower end of the 95 % interval", "+.3f", "> 0"),
        "mix_gain_share": ("gain of the best mixture over the winner's", ".2f", "≥ 0.9"),
        "mix_compute_share": ("its time, trainings included, over the search's", ".2f", "≤ 0.25"),
        "prefix_cache_time_ratio": ("training time with the shared prefix cache over without", ".2f", "≤ 0.6"),
    },
    "object": {
        "loss_matched": ("loss on the object, shown another picture of it", ".3f", "< none"),
        "loss_none": ("the same, shown nothing", ".3f", "< shuffled"),
        "loss_shuffled": ("the same, shown another object", ".3f", ""),
        "copy_gap": ("loss with another picture over that with the target itself, less 1", "+.2%", "≤ 2 %"),
        "copy_gap_self_pairs": ("the same of an encoder trained on self-pairs", "+.2%", ""),
        "position_correlation": ("correlation of the object's place with that in the reference", "+.2f", "≤ 0.1"),
        "identity_accuracy": ("pictures with all of the object's attributes right", ".2f", ""),
        "identity_accuracy_text_only": ("the same from the prompt alone", ".2f", ""),
        "near_identical_accuracy": ("nearer to the reference than to a nearly identical object", ".2f", ""),
        "prompt_accuracy": ("pictures with all right that the prompt asks for", ".2f", ""),
        "prompt_accuracy_text_only": ("the same with the object off", ".2f", ""),
        "copied_background": ("pictures with the reference's background where another is asked for", ".2f", ""),
        "seconds_per_object": ("processor seconds for a new object", ".3f", ""),
        "seconds_per_object_textual_inversion": ("the same, Textual Inversion", ".1f", ""),
        "seconds_per_object_dreambooth": ("the same, DreamBooth", ".1f", "≥ 100 × the encoder's"),
        "bytes_per_object_dreambooth": (
            "bytes stored for each object by DreamBooth; the encoder stores none",
            ".0f",
            "",
        ),
        "base_accuracy_change": ("text-to-image accuracy with the object off, less the base's", "+.3f", "≥ −0.02"),
    },
    "scale": {
        "weak_scaling_2": ("images/s of 2 workers over twice one worker's, median of pairs of runs", ".2f", "≥ 0.9"),
        "checkpoint_overhead": ("ledger and a checkpoint every 20 steps, share of step time", ".3f", "≤ 0.03"),
        "recovery_seconds": ("seconds from a worker's death to the next optimiser step", ".1f", "≤ 30"),
        "prompts_per_second": ("prompts read, filtered, deduplicated and tokenised a second", ".0f", ""),
        "prompts_over_training": ("the same over what training consumes", ".0f", "≥ 20"),
        "prompts_peak_gib": ("peak memory of 1,000,000 prompts, GiB", ".2f", "≤ 3"),
        "plan_time_error": ("`craftor plan` on this CPU: error of time", ".2f", "≤ 0.25"),
        "plan_memory_error": ("the same, of memory", ".2f", "≤ 0.2"),
    },
    "serve": {
        "w1_over_batch": ("w1, equal parameters: images/s over `serve.batch`", ".2f", "≥ 1"),
        "w2_over_batch": ("w2, mixed numbers of steps: the same", ".2f", ""),
        "w3_over_batch": ("w3, and mixed guidance: the same", ".2f", "≥ 2"),
        "w3_over_wide_batch": ("w3 over a `serve.batch` that takes four times as many, to find equals", ".2f", ""),
        "w3_over_compiled_batch": ("w3 over a `serve.batch` whose UNet is compiled for each size of group", ".2f", ""),
        "w3_plain_over_batch": ("w3 of an engine that is not compiled over a `serve.batch` that is not", ".2f", ""),
        "w4_over_batch": ("w4, and mixtures of four encoders: over `serve.batch`", ".2f", "≥ 2.2"),
        "w4_over_serial": ("w4 over one at a time", ".2f", "≥ 2.2"),
        "w5_over_batch": ("w5, a fifth of w4's requests cancelled: over `serve.batch`", ".2f", ""),
        "w6_over_batch": ("w6, w4 in bursts: the same", ".2f", ""),
        "w4_of_ceiling": ("share of what the UNet alone could do", ".2f", "≥ 0.85"),
        "w4_p95_over_solo": ("95th percentile of latency at 0.8 of saturation over one request's alone", ".2f", "≤ 3"),
        "engine_overhead": ("everything but the UNet call, share of a full step", ".3f", "≤ 0.1"),
        "overload_p95_ratio": ("95th percentile at 3 × saturation over that at 0.8", ".2f", "≤ 2"),
        "overload_5xx": ("server errors under overload", ".0f", "0"),
        "overload_rss_growth_first": (
            "growth of memory in a first overload",
            ".3f",
            "",
        ),
        "overload_rss_growth": ("growth of memory in a second", ".3f", "≤ 0.05"),
        "soak_5xx": ("server errors in 10 minutes at 0.8", ".0f", "0"),
        "soak_rss_growth": ("growth of memory in them", ".3f", "≤ 0.05"),
        "promotion_failures": ("requests failed by promotions under load", ".0f", "0"),
        "recovery_seconds": ("seconds until a replica that was killed under load is back", ".1f", "≤ 30"),
        "recovery_errors": ("errors then, beyond the requests that were in flight", ".0f", "0"),
        "fuzz_cases": ("generated requests against the OpenAPI document", ".0f", "≥ 2000"),
        "fuzz_5xx": ("server errors among them", ".0f", "0"),
    },
}
"""By benchmark and key: what the figure is, its format and what was aimed at."""
EXTRA: dict[str, Callable[[Mapping], str]] = {"train": replays, "serve": rates, "object": objects, "scale": pairs}


if __name__ == "__main__":
    main()
