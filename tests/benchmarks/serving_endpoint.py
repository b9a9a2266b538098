"""Figures of the whole endpoint: overload, a soak with promotions, generated requests, and a replica that is killed."""

import argparse
import asyncio
import copy
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

from benchmarks import harness, serving_http
from benchmarks.serving_load import COMPILED, workload
from craftor import recipe, registry
from craftor.diffuser import Diffuser
from craftor.encoders import Encoder
from craftor.tracking import EXPERIMENT, Tracker, client
from serving_parts import replicas

RECIPE = harness.ROOT / "recipes" / "micro_textcraftor.toml"


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
        crowd, once = drive(3.0, 2, seconds), serving_http.resident_mib(process)
        again, twice = drive(3.0, 4, seconds), serving_http.resident_mib(process)
        figures["overload_p95_ratio"] = crowd.p95 / calm.p95
        figures["overload_5xx"] = crowd.failures + again.failures
        # What a first fills once, a second does not fill again; a leak would go on.
        figures["overload_rss_growth_first"] = once / before - 1
        figures["overload_rss_growth"] = twice / once - 1
        details["overload"] = {
            name: {"statuses": dict(found.statuses), "p95": found.p95, "latencies": found.latencies}
            for name, found in (("calm", calm), ("crowd", crowd), ("again", again))
        } | {"mib": [before, once, twice]}

        # The soak, in ten parts; after each the alias moves to the other version, while requests are in flight.
        soak, memory, promoted, failed = serving_http.Answers(), [], 0, 0
        parts = 10 if arguments.soak_seconds > 60 else 2
        for part in range(parts):
            version = str(1 + part % 2)
            connected.set_registered_model_alias("style", "champion", version)
            answers = drive(0.8, 10 + part, arguments.soak_seconds / parts)
            served = httpx.get(f"{url}/readyz").json()["encoders"]["style"]
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
        counted = statuses_of(httpx.get(f"{url}/metrics").text)
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


def recovery(folder: Path, bucket: int, clients: int = 4) -> dict[str, float]:
    """Killing Ray Serve's only replica under load: seconds to the next image, and errors of more than was in flight."""
    from craftor.cluster import ray_session

    with ray_session(num_workers=1):
        from ray import serve

        from craftor.serving.deployment import start
        from craftor.serving.settings import Serving

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        settings = {"model": COMPILED.model_dump(), "engine": {"bucket": bucket}, "http": {"port": port}}
        start(Serving.model_validate(settings | {"runs": str(folder)}))
        url, ask = f"http://127.0.0.1:{port}/v1/images/generations", {"prompt": "a red star", "steps": 4}
        answers: list[bool] = []
        enough = threading.Event()

        def answered(timeout: float) -> bool:
            try:
                return httpx.post(url, json=ask, timeout=timeout).status_code == 200
            except httpx.TransportError:
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
