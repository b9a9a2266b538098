"""`make bench-serve`: images from mixtures by continuous batching, against the plain ways to serve them.

Throughput and latency of the engine and its baselines are taken in this process, on one core, without HTTP, seed by
seed in turn (`serving_load`); overload, soak, promotion and fuzzing against the endpoint in a process of its own
(`serving_endpoint`); recovery on Ray Serve. The micro model, in bf16 where the CPU multiplies it, one thread. Strict
mode throughout.

`grouped` takes as many requests as fill the engine's UNet call when they have equal parameters. `wide` takes four times
as many, to find more equals among them: with few combinations of parameters that is a better batch, if the device holds
it; among mixtures nobody finds equals. The engine's UNet is compiled, as its one size of call allows; the others run
diffusers' pipelines as they come. On equal footing are `plain`, an engine that is not compiled, with `grouped`, and the
engine with `compiled`: `grouped` with a UNet compiled for each size that w3's groups have (half a minute for every one,
in a run before the one that is measured).
"""

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import harness
from benchmarks.serving_endpoint import fuzz, noisy_encoder, over_http, recovery, registered
from benchmarks.serving_load import COMPILED, MODEL, Continuous, Grouped, Outcome, run, work, workload
from craftor.diffuser import Diffuser, load
from craftor.quiet import hush
from craftor.serving import buckets
from craftor.serving.batch import network
from craftor.serving.engine import Engine
from craftor.serving.settings import EngineSettings
from craftor.serving.work import ImageRequest, Share

WORKLOADS = ("w1", "w2", "w3", "w4", "w5", "w6")
W3_ALONE = ("plain", "wide", "compiled")
"""Servers that only w3 is put to."""


class Overhead:
    """An observer of full steps: the UNet call's time and all the rest."""

    def __init__(self) -> None:
        self.network = self.rest = 0.0
        self.steps = 0

    def stepped(self, slots: int, bucket: int, seconds: float, overhead: float, reason: str) -> None:
        if slots == bucket:
            self.network, self.rest, self.steps = self.network + seconds, self.rest + overhead, self.steps + 1

    def started(self, waited: float) -> None: ...
    def ended(self, outcome: str, seconds: float) -> None: ...


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=40, help="of one run of a workload")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--bucket", type=int, default=32, help="slots of a UNet call")
    parser.add_argument("--poisson-seconds", type=float, default=45, help="of load for each latency figure")
    parser.add_argument("--soak-seconds", type=float, default=600)
    parser.add_argument("--fuzz-examples", type=int, default=400, help="of each operation")
    parser.add_argument("--rates", metavar="w3,w4", help="the throughput of these workloads alone: nothing is written")
    parser.add_argument("--endpoint", action="store_true", help="overload and soak again, the rest as it was measured")
    parser.add_argument("--quick", action="store_true", help="two minutes, to see that it runs: no figures to quote")
    arguments = parser.parse_args()
    if arguments.quick:
        quick = {"requests": 8, "seeds": 1, "bucket": 4, "poisson_seconds": 6, "soak_seconds": 8, "fuzz_examples": 5}
        arguments = argparse.Namespace(**vars(arguments) | quick)
    started = time.perf_counter()
    hush()
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[0]})
    console = Console(width=120)

    if arguments.rates:
        print_rates(arguments, console)
        return
    if arguments.endpoint:
        known = json.loads((harness.OUT / "serve.json").read_text())
        figures, details = known["figures"], known["details"]
        started -= known["seconds"]
    else:
        figures, details = in_process(arguments, console)
        details["settings"] = vars(arguments)

    def note(more: Mapping[str, float]) -> None:
        """Show and keep what there is: the parts to come take half an hour."""
        for key, value in more.items():
            console.print(f"{key:32s} {value:.4g}", highlight=False)
        figures.update(more)
        if not arguments.quick:
            harness.write("serve", figures=figures, details=details, started=started)

    os.sched_setaffinity(0, set(cores))
    note(figures)
    with TemporaryDirectory() as folder:
        if not arguments.endpoint:
            note(recovery(Path(folder), arguments.bucket))
        connected, bundles = registered(load(MODEL), Path(folder))
        settings = {
            "model": COMPILED.model_dump(),
            "encoders": {"style": "style@champion", "fixed": str(bundles[1])},
            "poll_seconds": 1.0,
            "runs": folder,
            "engine": {"bucket": details["bucket"], "queue_seconds": 2.0},
        }
        os.sched_setaffinity(0, {cores[-1]})
        if not arguments.endpoint:
            note(fuzz(settings, Path(folder), cores[0], arguments.fuzz_examples, details))
        guess = figures["engine_images_per_second"]
        last = over_http(settings, connected, arguments, guess, Path(folder), cores[0], details)
        os.sched_setaffinity(0, set(cores))
        note(last)
    console.print("quick: nothing is written" if arguments.quick else harness.OUT / "serve.json")


def in_process(arguments: argparse.Namespace, console: Console) -> tuple[dict, dict]:
    """Throughput of every workload and server, and the engine's latency under load."""
    seen = Overhead()
    engine = Engine(load(COMPILED).hold_rounded(), engine_settings(arguments), seen).start()
    encoders = noisy_shares(engine.base)
    size = max(1, engine.capacity // 2)
    servers = servers_of(engine)
    rates, shares, calls = saturated(engine, servers, WORKLOADS, arguments, encoders)
    for server in servers[1:]:
        server.stop()
    overhead = seen.rest / seen.network

    saturation = float(np.median(rates["w4"]["continuous"]))
    number = max(8, int(0.8 * saturation * arguments.poisson_seconds))
    loaded: list[Outcome] = []
    alone: list[float] = []
    for seed in range(arguments.seeds):
        asks = workload("w4", number // arguments.seeds + 1, 100 + seed, encoders)
        loaded.append(run(servers[0], asks, rate=0.8 * saturation, horizon=0, seed=seed))
        alone += [_alone(engine, ask.request) for ask in asks[:: max(1, len(asks) // 12)]]
    engine.stop()
    p95 = float(np.median([np.percentile(outcome.latencies, 95) for outcome in loaded]))
    figures = {f"{w}_over_batch": ratio(rates[w], "continuous", "grouped") for w in WORKLOADS}
    figures |= {f"{w}_over_serial": ratio(rates[w], "continuous", "serial") for w in WORKLOADS}
    figures |= {
        "w3_over_wide_batch": ratio(rates["w3"], "continuous", "wide"),
        "w3_over_compiled_batch": ratio(rates["w3"], "continuous", "compiled"),
        "w3_plain_over_batch": ratio(rates["w3"], "plain", "grouped"),
        "w4_of_ceiling": float(np.median(shares)),
        "w4_p95_over_solo": p95 / float(np.percentile(alone, 95)),
        "engine_overhead": overhead,
        "engine_images_per_second": saturation,
    }
    console.print(table(rates))
    details = {
        "images_per_second": rates,
        "profile_seconds": engine.profile,
        "bucket": engine.capacity,
        "batch_size_of_grouped": size,
        "w4_seconds": {"p95_at_0.8": p95, "alone": alone},
        "batch_size_of_wide": 4 * size,
        "full_steps": seen.steps,
        "full_call_seconds": calls,
        "ceiling": "images/s of w4 if all time were UNet calls of full buckets, as timed before and after each run",
    }
    return figures, details


def print_rates(arguments: argparse.Namespace, console: Console) -> None:
    """The table of some workloads, and their ratios."""
    engine = Engine(load(COMPILED).hold_rounded(), engine_settings(arguments), Overhead()).start()
    servers, names = servers_of(engine), arguments.rates.split(",")
    rates, _, _ = saturated(engine, servers, names, arguments, noisy_shares(engine.base))
    for server in servers[1:]:
        server.stop()
    engine.stop()
    console.print(table(rates))
    for name in names:
        for other in list(rates[name])[1:]:
            each = ", ".join(f"{a / b:.2f}" for a, b in zip(rates[name]["continuous"], rates[name][other], strict=True))
            console.print(
                f"{name} over {other}: {ratio(rates[name], 'continuous', other):.3f} ({each})", highlight=False
            )
        if "plain" in rates[name]:
            console.print(f"{name} of neither compiled: {ratio(rates[name], 'plain', 'grouped'):.3f}", highlight=False)


def engine_settings(arguments: argparse.Namespace) -> EngineSettings:
    return EngineSettings(bucket=arguments.bucket, queue_seconds=1e6)


def noisy_shares(base: Diffuser) -> list[Share]:
    """Four encoders in equal parts."""
    return [Share(noisy_encoder(base, seed), 0.25, (999, 0)) for seed in range(4)]


def servers_of(engine: Engine) -> list[Continuous | Grouped]:
    """The engine, and one not compiled; batches that fill its call, the same compiled, wide ones; one at a time."""
    size, base = max(1, engine.capacity // 2), load(MODEL)
    plain = Engine(load(MODEL).hold_rounded(), engine.settings).start()
    return [
        Continuous(engine, "continuous"),
        Continuous(plain, "plain"),
        Grouped(base, "grouped", size),
        Grouped(base, "compiled", size, compiled=True),
        Grouped(base, "wide", 4 * size),
        Grouped(base, "serial", 1, wait=0.0),
    ]


def saturated(
    engine: Engine,
    servers: list[Continuous | Grouped],
    names: Sequence[str],
    arguments: argparse.Namespace,
    encoders: list[Share],
) -> tuple[dict[str, dict[str, list[float]]], list[float], list[float]]:
    """Images/s of each workload and server, seed by seed; in w4 the engine's share of full calls, and their seconds."""
    kept = {name: [s for s in servers if s.name not in W3_ALONE or name == "w3"] for name in names}
    rates: dict[str, dict[str, list[float]]] = {name: {s.name: [] for s in own} for name, own in kept.items()}
    shares: list[float] = []
    calls: list[float] = []
    for seed in range(arguments.seeds):
        for name in names:
            asks = workload(name, arguments.requests, seed, encoders)
            horizon = sum(engine.cost(ask.request) for ask in asks)
            first = seed % len(servers)
            for server in servers[first:] + servers[:first]:
                if server in kept[name]:
                    before = full_call(engine) if (name, server.name) == ("w4", "continuous") else []
                    if server.name == "compiled":
                        run(server, asks, rate=None, horizon=horizon, seed=seed)
                    found = run(server, asks, rate=None, horizon=horizon, seed=seed)
                    rates[name][server.name].append(found.rate)
                    if before:
                        calls.append(float(np.median(before + full_call(engine))))
                        shares.append(found.rate * work(asks).mean() * calls[-1] / engine.capacity)
    return rates, shares, calls


def full_call(engine: Engine, times: int = 10) -> list[float]:
    """Seconds of UNet calls of a full bucket and of nothing else; the engine must have nothing to do."""
    plain, shape = network(engine.base, engine.base.latent_shape), engine.base.latent_shape
    size = engine.capacity
    return [buckets.measure(plain, shape, engine.base.null(), [size], repeats=1)[size] for _ in range(times)]


def _alone(engine: Engine, request: ImageRequest) -> float:
    began = time.perf_counter()
    engine.submit([request])[0].done.result()
    return time.perf_counter() - began


def ratio(rates: dict[str, list[float]], ours: str, theirs: str) -> float:
    """The median over seeds of the ratio of both on the same requests."""
    return float(np.median(np.array(rates[ours]) / np.array(rates[theirs])))


def table(rates: dict[str, dict[str, list[float]]]) -> Table:
    out = Table(title="images/s at saturation, one core: median over seeds (least, most)", title_justify="left")
    out.add_column("workload")
    servers = list(max(rates.values(), key=len))
    for server in servers:
        out.add_column(server, justify="right")
    for name, row in rates.items():
        found = (row.get(server) for server in servers)
        out.add_row(name, *(f"{np.median(r):.2f} ({min(r):.2f}, {max(r):.2f})" if r else "" for r in found))
    return out


if __name__ == "__main__":
    main()
