"""Replicas on Ray Serve: each is the whole HTTP app around an engine of its own.

Serve routes, scales, restarts and drains; it does not batch. Its `serve.batch` runs a call to its end before the next
begins and splits batches by parameters, while the engine lets any rows meet at any step. So `max_ongoing_requests` is
far above what an engine holds: the engine must see what it is to batch, and refuses by cost itself. Every replica holds
every encoder, so any may answer; what only one of them knows, a job to cancel or what the registry says, is asked of
or told to all.
"""

import asyncio
import signal
import threading
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import RayServeException

from craftor.cluster import ray_session
from craftor.quiet import hush
from craftor.serving.api import Everywhere, build_app
from craftor.serving.jobs import NOT_HERE
from craftor.serving.routing import HELD
from craftor.serving.service import Service, service
from craftor.serving.settings import Serving, load, parse
from craftor.serving.watcher import Seen

APP, DEPLOYMENT = "craftor", "Replica"


@serve.ingress()
class Replica:
    """One engine behind HTTP."""

    def __init__(self, settings: dict[str, Any]) -> None:
        hush()
        self._open = ExitStack()
        self._service = self._open.enter_context(service(parse(settings, "serve"), _is_first, _tell_all_of))

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_app(
            self._service, Everywhere(_cancel_everywhere, _look_everywhere, partial(_metrics_everywhere, self._service))
        )

    def cancel_here(self, job: str, client: str) -> int:
        """Images given up, or NOT_HERE."""
        return self._service.jobs.cancel(job, client)

    def metrics_here(self) -> tuple[str, bytes]:
        return _metrics_of(self._service)

    def look_here(self) -> None:
        """At the registry, now, if this is the replica that looks."""
        self._service.watcher.hint()

    def hear_here(self, seen: Seen) -> None:
        """What it saw."""
        self._service.watcher.hear(seen)

    def record_routing_stats(self) -> dict[str, list[str]]:
        """For `routing`."""
        table = self._service.library.table
        return {HELD: [*table, *(f"{encoder.name}/{encoder.version}" for encoder in table.values())]}

    def check_health(self) -> None:
        """Serve starts a replica anew that could draw no more, or follow the registry no more."""
        if not self._service.alive:
            raise RuntimeError("a thread of the engine or of the watcher has ended; the log says why")

    def __del__(self) -> None:
        self._open.close()


def _is_first() -> bool:
    """Whether this replica looks at the registry for all; Serve keeps their ranks without gaps."""
    rank = serve.get_replica_context().rank
    return rank is not None and rank.rank == 0


def _tell_all_of(seen: Seen) -> None:
    """From the watcher's thread. Who cannot be told now hears the next one."""
    _tell_all("hear_here", seen, seconds=30)


async def _cancel_everywhere(job: str, client: str) -> int:
    told = await asyncio.to_thread(_tell_all, "cancel_here", job, client)
    return max((one for one in told if isinstance(one, int)), default=NOT_HERE)


async def _look_everywhere() -> None:
    await asyncio.to_thread(_tell_all, "look_here")


async def _metrics_everywhere(own: Service) -> dict[str, bytes]:
    told = await asyncio.to_thread(_tell_all, "metrics_here")
    return dict([_metrics_of(own), *(one for one in told if isinstance(one, tuple))])


def _metrics_of(own: Service) -> tuple[str, bytes]:
    """With this replica's id."""
    return serve.get_replica_context().replica_id.unique_id, own.metrics.text()


def _tell_all(method: str, *arguments: Any, seconds: float = 5) -> list[Any]:
    """What each replica answers, or the error in place of it; nothing where Serve's controller is away."""
    with suppress(RayError, RayServeException, TimeoutError):
        told = serve.get_deployment_handle(DEPLOYMENT, APP).broadcast(method, *arguments)
        # Not `results_async`: there one replica that does not answer in time takes away what the others said.
        return told.results(timeout_s=seconds, return_exceptions=True)
    return []


def build(arguments: dict[str, Any]) -> Application:
    """The application, for `serve run` and `serve deploy`: `{"recipe": FILE}`, or the file's content itself."""
    if set(arguments) == {"recipe"}:
        return application(load(Path(arguments["recipe"])))
    return application(parse(arguments, "args"))


def application(settings: Serving) -> Application:
    replicas = settings.replicas
    fixed: dict[str, Any] = {"num_replicas": replicas.min}
    scaled: dict[str, Any] = {
        "autoscaling_config": {
            "min_replicas": replicas.min,
            "max_replicas": replicas.max,
            "target_ongoing_requests": replicas.target_ongoing_requests,
        }
    }
    deployment = serve.deployment(
        Replica,
        name=DEPLOYMENT,
        ray_actor_options={"num_cpus": replicas.num_cpus, "num_gpus": replicas.num_gpus},
        max_ongoing_requests=replicas.max_ongoing_requests,
        request_router_config=RequestRouterConfig(
            request_router_class="craftor.serving.routing.PreferHolders",
            request_routing_stats_period_s=settings.poll_seconds,
        ),
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=60,
        **(fixed if replicas.min == replicas.max else scaled),
    )
    return deployment.bind(_absolute(settings).model_dump(mode="json"))


def start(settings: Serving) -> None:
    """Serve on the settings' address; returns when the application answers."""
    http = settings.http
    tls = {"ssl_certfile": http.certificate, "ssl_keyfile": http.key}
    serve.start(http_options={"host": http.host, "port": http.port, **tls})
    serve.run(application(settings), name=APP, route_prefix="/")


def stop() -> None:
    """Let nobody in any more, answer who is, and end. A second interruption does not wait."""
    with suppress(KeyboardInterrupt):
        serve.delete(APP)  # waits for requests as long as the deployment's `graceful_shutdown_timeout_s`
    serve.shutdown()


def serve_for_ever(settings: Serving) -> None:
    """What `craftor serve` does: a local Ray, or that of `RAY_ADDRESS`, until interrupted or told to end (SIGTERM)."""
    with ray_session(num_workers=int(settings.replicas.max * settings.replicas.num_cpus)):
        start(settings)
        http = settings.http
        url = f"{'https' if http.certificate else 'http'}://{http.host}:{http.port}"
        print(f"{url}/v1/images/generations", flush=True)
        if http.playground:
            print(f"{url}/playground", flush=True)
        told = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: told.set())
        with suppress(KeyboardInterrupt):
            told.wait()
        stop()


def _absolute(settings: Serving) -> Serving:
    """Local paths made absolute: replicas have another working directory."""

    def fix(path: str) -> str:
        return str(Path(path).resolve()) if Path(path).exists() else path

    return settings.model_copy(
        update={
            "model": settings.model.model_copy(update={"path": fix(settings.model.path)}),
            "controlnet": settings.controlnet and fix(settings.controlnet),
            "object_encoder": settings.object_encoder and fix(settings.object_encoder),
            "encoders": {name: fix(source) for name, source in settings.encoders.items()},
            "canaries": {
                name: canary.model_copy(update={"source": fix(canary.source)})
                for name, canary in settings.canaries.items()
            },
            "runs": str(Path(settings.runs).resolve()),
        }
    )
