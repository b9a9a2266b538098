"""`make bench-serve`: images from mixtures by continuous batching, against the plain ways to serve them.

Throughput and latency of the engine and its baselines are taken in this process, on one core, without HTTP, seed by
seed in turn (`serving_load`); overload, soak, promotion and fuzzing against the endpoint in a process of its own
(`serving_http`); recovery on Ray Serve. The micro model, bf16, one thread. Strict mode throughout.

`grouped` takes as many requests as fill the engine's UNet call when they have equal parameters. `wide` takes four times
as many, to find more equals among them: with few combinations of parameters that is a better batch, if the device holds
it; among mixtures nobody finds equals.
"""

import argparse
import asyncio
import copy
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import harness, serving_http
from benchmarks.serving_load import Continuous, Grouped, Outcome, run, work, workload
from craftor import recipe, registry
from craftor.diffuser import Diffuser, load
from craftor.encoders import Encoder
from craftor.quiet import hush
from craftor.recipe import Model
from craftor.serving import buckets
from craftor.serving.batch import network
from craftor.serving.engine import Engine
from craftor.serving.settings import EngineSettings
from craftor.serving.work import ImageRequest, Share
from craftor.tracking import EXPERIMENT, Tracker, client
from serving_parts import replicas

WORKLOADS = ("w1", "w2", "w3", "w4", "w5", "w6")
MODEL = Model(path="micro:base", precision="bf16")
"""As models are served: this CPU multiplies bfloat16 twice as fast, which helps full calls more than small ones."""
RECIPE = harness.ROOT / "recipes" / "micro_textcraftor.toml"


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
    parser.add_argument("--bucket", type=int, default=None, help="slots of a UNet call; by default measured")
    parser.add_argument("--poisson-seconds", type=float, default=45, help="of load for each latency figure")
    parser.add_argument("--soak-seconds", type=float, default=600)
    parser.add_argument("--fuzz-examples", type=int, default=400, help="of each operation")
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

    base = load(MODEL).hold_rounded()
    figures, details = in_process(base, arguments, console)
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
        note(recovery(Path(folder)))
        connected, bundles = registered(base, Path(folder))
        settings = {
            "model": MODEL.model_dump(),
            "encoders": {"style": "style@champion", "fixed": str(bundles[1])},
            "poll_seconds": 1.0,
            "runs": folder,
            "engine": {"bucket": details["bucket"], "queue_seconds": 2.0},
        }
        os.sched_setaffinity(0, {cores[-1]})
        note(fuzz(settings, Path(folder), cores[0], arguments.fuzz_examples, details))
        guess = figures["engine_images_per_second"]
        last = over_http(settings, connected, arguments, guess, Path(folder), cores[0], details)
        os.sched_setaffinity(0, set(cores))
        note(last)
    console.print("quick: nothing is written" if arguments.quick else harness.OUT / "serve.json")


def in_process(base: Diffuser, arguments: argparse.Namespace, console: Console) -> tuple[dict, dict]:
    """Throughput of every workload and server, and the engine's latency under load."""
    encoders = [Share(noisy_encoder(base, seed), 0.25, (999, 0)) for seed in range(4)]
    seen = Overhead()
    settings = EngineSettings(bucket=arguments.bucket, queue_seconds=1e6)
    engine = Engine(base, settings, seen).start()
    size = max(1, engine.capacity // 2)
    servers = [
        Continuous(engine),
        Grouped(base, "grouped", size),
        Grouped(base, "wide", 4 * size),
        Grouped(base, "serial", 1, wait=0.0),
    ]
    rates: dict[str, dict[str, list[float]]] = {w: {s.name: [] for s in servers} for w in WORKLOADS}
    for name in set(WORKLOADS) - {"w3"}:
        del rates[name]["wide"]
    shares: list[float] = []
    calls: list[float] = []
    for seed in range(arguments.seeds):
        for name in WORKLOADS:
            asks = workload(name, arguments.requests, seed, encoders)
            horizon = sum(engine.cost(ask.request) for ask in asks)
            for server in servers[seed:] + servers[:seed]:
                if server.name in rates[name]:
                    before = full_call(engine) if (name, server.name) == ("w4", "continuous") else []
                    found = run(server, asks, rate=None, horizon=horizon, seed=seed)
                    rates[name][server.name].append(found.rate)
                    if before:
                        calls.append(float(np.median(before + full_call(engine))))
                        shares.append(found.rate * work(asks).mean() * calls[-1] / engine.capacity)
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
    for server in rates["w3"]:
        out.add_column(server, justify="right")
    for name, row in rates.items():
        found = (row.get(server) for server in rates["w3"])
        out.add_row(name, *(f"{np.median(r):.2f} ({min(r):.2f}, {max(r):.2f})" if r else "" for r in found))
    return out


def over_http(
    settings: dict[str, Any],
    connected: Any,
    arguments: argparse.Namespace,
    guess: float,
    folder: Path,
    core: int,
    details: dict[str, Any],
) -> dict[str, float]:
    """Overload, and a soak with promotions; the server on one core, the client here on another.

    `guess` is the engine's saturation without HTTP; the server's own is what it answers when it gets far more.
    """
    names, seconds = ("style", "fixed"), arguments.poisson_seconds
    figures: dict[str, float] = {}
    with serving_http.server(settings, folder, core) as (url, process):
        asyncio.run(serving_http.load(url, bodies(12, 0, names), 2 * guess, 0))  # warm
        number = int(3 * guess * seconds / 2) + 8
        full = asyncio.run(serving_http.load(url, bodies(number, 3, names), 3 * guess, 3))
        figures["http_images_per_second"] = rate = full.rate(seconds / 8, seconds / 2)

        def drive(part: float, seed: int, seconds: float) -> serving_http.Answers:
            number = max(8, int(part * rate * seconds))
            return asyncio.run(serving_http.load(url, bodies(number, seed, names), part * rate, seed))

        calm, before = drive(0.8, 1, seconds), serving_http.resident_mib(process)
        crowd = drive(3.0, 2, seconds)
        figures["overload_p95_ratio"] = crowd.p95 / calm.p95
        figures["overload_5xx"] = crowd.failures
        figures["overload_rss_growth"] = serving_http.resident_mib(process) / before - 1
        details["overload"] = {
            name: {"statuses": dict(found.statuses), "p95": found.p95, "latencies": found.latencies}
            for name, found in (("calm", calm), ("crowd", crowd))
        }

        # The soak, in ten parts; after each the alias moves to the other version, while requests are in flight.
        soak, memory, promoted, failed = serving_http.Answers(), [], 0, 0
        parts = 10 if arguments.soak_seconds > 60 else 2
        for part in range(parts):
            version = str(1 + part % 2)
            connected.set_registered_model_alias("style", "champion", version)
            answers = drive(0.8, 10 + part, arguments.soak_seconds / parts)
            served = serving_http.httpx.get(f"{url}/readyz").json()["encoders"]["style"]
            promoted += served == f"models:/style/{version}"
            failed += answers.failures
            soak.statuses += answers.statuses
            soak.latencies += answers.latencies
            memory.append(serving_http.resident_mib(process))
        figures["soak_5xx"] = soak.failures
        figures["soak_rss_growth"] = memory[-1] / memory[len(memory) // 4] - 1
        figures["promotion_failures"] = failed + (parts - promoted)
        details["soak"] = {"mib": memory, "statuses": dict(soak.statuses), "promotions": promoted, "p95": soak.p95}
    return figures


def bodies(number: int, seed: int, names: Sequence[str]) -> list[dict[str, Any]]:
    """Requests like those of w4, over the encoders that are served."""
    out = []
    drawn = np.random.default_rng(seed)
    for ask in workload("w3", number, seed, ()):
        weights = drawn.dirichlet(np.ones(len(names) + 1))[1:]
        request = ask.request
        out.append(
            {
                "prompt": request.prompt,
                "seed": request.seed,
                "steps": request.num_steps,
                "guidance_scale": request.guidance_scale,
                "mix": {name: round(float(w), 3) for name, w in zip(names, weights, strict=True)},
            }
        )
    return out


def fuzz(settings: dict[str, Any], folder: Path, core: int, examples: int, details: dict[str, Any]) -> dict[str, float]:
    """Schemathesis over the OpenAPI document, valid and invalid cases; what it may ask for is kept small."""
    small = settings | {"limits": {"steps": 2, "images": 2}, "defaults": {"steps": 2}}
    small["engine"] = settings["engine"] | {"queue_seconds": 600.0}
    report = folder / "fuzz.ndjson"
    with serving_http.server(small, folder, core) as (url, _):
        command = [str(Path(sys.executable).parent / "schemathesis"), "run", f"{url}/openapi.json"]
        command += ["--max-examples", str(examples), "--checks", "not_a_server_error", "--request-timeout", "60"]
        command += ["--max-time", "360", "--continue-on-failure"]
        command += ["--report", "ndjson", "--report-ndjson-path", str(report)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
        counted = statuses_of(serving_http.httpx.get(f"{url}/metrics").text)
    details["fuzz"] = {"statuses": counted, "exit": done.returncode, "output": done.stdout[-3000:]}
    return {
        "fuzz_cases": float(sum(counted.values())),
        "fuzz_5xx": float(
            sum(count for status, count in counted.items() if status.startswith("5") or status == "none")
        ),
        "fuzz_failed": float(done.returncode != 0),
    }


def statuses_of(metrics: str) -> dict[str, float]:
    """Answers under /v1 by status, as the server counted them."""
    found: dict[str, float] = {}
    for line in metrics.splitlines():
        if line.startswith("craftor_http_requests_total{") and ('route="/v1' in line or 'route="other"' in line):
            status = line.split('status="')[1].split('"')[0]
            found[status] = found.get(status, 0) + float(line.rsplit(" ", 1)[1])
    return found


def recovery(folder: Path, clients: int = 4) -> dict[str, float]:
    """Killing Ray Serve's only replica under load: seconds to the next image, and errors of more than was in flight."""
    from craftor.cluster import ray_session

    with ray_session(num_workers=1):
        from ray import serve

        from craftor.serving.deployment import start
        from craftor.serving.settings import Serving

        with serving_http.socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        start(Serving.model_validate({"model": MODEL.model_dump(), "http": {"port": port}, "runs": str(folder)}))
        url, ask = f"http://127.0.0.1:{port}/v1/images/generations", {"prompt": "a red star", "steps": 4}
        answers: list[bool] = []
        enough = threading.Event()

        def answered(timeout: float) -> bool:
            try:
                return serving_http.httpx.post(url, json=ask, timeout=timeout).status_code == 200
            except serving_http.httpx.TransportError:
                return False

        def ask_on() -> None:
            while not enough.is_set():
                answers.append(answered(120))

        def first_image() -> float:
            began = time.perf_counter()
            while not answered(5):
                time.sleep(0.2)
            return time.perf_counter() - began

        first_image()
        crowd = [threading.Thread(target=ask_on) for _ in range(clients)]
        for thread in crowd:
            thread.start()
        time.sleep(5)
        (replica,) = replicas()
        replica.kill()
        seconds = first_image()
        time.sleep(5)
        enough.set()
        for thread in crowd:
            thread.join()
        serve.shutdown()
    return {"recovery_seconds": seconds, "recovery_errors": float(max(0, answers.count(False) - clients))}


def noisy_encoder(base: Diffuser, seed: int) -> Encoder:
    """The base's encoder with noise on its weights: what it makes of prompts does not matter here, its cost does."""
    module = copy.deepcopy(base.text_encoder)
    g = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data += 0.05 * parameter.std().nan_to_num() * torch.randn(parameter.shape, generator=g)
    return Encoder(f"noisy{seed}", None, "", f"{seed:064x}", None, {"text_encoder": module}, (999, 0), {})


def registered(base: Diffuser, folder: Path) -> tuple[Any, list[Path]]:
    """Two versions of `style` in a registry of their own, and their bundles."""
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    os.environ["CRAFTOR_CACHE"] = str(folder)
    connected = client(folder)
    experiment = connected.get_experiment_by_name(EXPERIMENT)
    settings = recipe.load(RECIPE, {"register.name": "style", "register.aliases": ["champion"]})
    bundles = []
    for seed in (1, 2):
        trained = folder / f"trained{seed}"
        noisy_encoder(base, seed).module.save_pretrained(trained / "text_encoder", safe_serialization=True)
        bundles.append(registry.write_bundle(settings, base, trained, folder / f"bundle{seed}"))
        run_id = connected.create_run(experiment.experiment_id).info.run_id
        registry.register(connected, Tracker(connected, run_id), settings, bundles[-1], step=1)
    return connected, bundles


if __name__ == "__main__":
    main()
