"""The HTTP interface of one replica: OpenAI's images API with mixtures, and what operators need."""

import asyncio
import base64
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from fastapi_offline import FastAPIOffline

from craftor import __version__
from craftor.serving import errors, tracing
from craftor.serving.admission import Rejected
from craftor.serving.body_limit import BodyLimit
from craftor.serving.count import CountAnswers
from craftor.serving.errors import ApiError, busy
from craftor.serving.generation import begin, events, picture, submit
from craftor.serving.jobs import NOT_HERE
from craftor.serving.listing import encoder_entry, model_entry, size_name
from craftor.serving.metrics import together
from craftor.serving.schema import Generation
from craftor.serving.service import Service
from craftor.serving.webhook import from_mlflow


@dataclass(frozen=True)
class Everywhere:
    """What all replicas are told, this one included."""

    cancel: Callable[[str, str], Awaitable[int]]
    """A client's job, as `Jobs.cancel`."""
    look: Callable[[], Awaitable[None]]
    """At the registry, now."""
    metrics: Callable[[], Awaitable[dict[str, bytes]]]
    """What each replica counts, by its id."""


def build_app(service: Service, everywhere: Everywhere | None = None) -> FastAPI:
    """The replica's ASGI app."""
    settings = service.settings
    summary = "Images from any mixture of tuned text encoders."
    # Its page is FastAPI's, with scripts of its own: FastAPI's loads them from elsewhere, where servers may not reach.
    app = FastAPIOffline(title="Craftor", version=__version__, summary=summary, redoc_url=None)
    errors.install(app)
    app.add_middleware(CountAnswers, metrics=service.metrics)
    app.add_middleware(BodyLimit, limit=settings.limits.body_bytes)
    if settings.http.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.http.cors_origins), allow_methods=["*"], allow_headers=["*"]
        )
    _operations(app, service, everywhere)
    _images(app, service, everywhere)
    if settings.http.playground:
        _playground(app)
    _document_what_is_answered(app)
    return app


def _images(app: FastAPI, service: Service, everywhere: Everywhere | None) -> None:
    settings, engine = service.settings, service.engine

    def client(authorization: Annotated[str | None, Header()] = None) -> str:
        return service.gate.client(authorization)

    Client = Annotated[str, Depends(client)]

    @app.post("/v1/images/generations", responses=ERRORS)
    async def generate(
        body: Generation,
        request: Request,
        client: Client,
        x_job_id: Annotated[str | None, Header()] = None,
        x_deadline_ms: Annotated[int | None, Header(ge=1, le=86_400_000)] = None,
    ) -> Response:
        """Images of a prompt. `X-Deadline-Ms`: refuse at once (429) what cannot be done by then."""
        # A token's owner may ask for many users; without tokens, an address is the best there is.
        address = request.client.host if request.client and not settings.tokens else ""
        images = service.interpreter.images(body, f"{client}/{body.user or address}")
        if not engine.alive:
            raise ApiError(503, "this replica has failed; ask again", code="replica_failed")
        job = service.jobs.name(x_job_id)
        try:
            with service.gate.charge(client, sum(engine.cost(image) for image in images)):
                deadline = None if x_deadline_ms is None else x_deadline_ms / 1000
                asked = submit(engine, images, client, deadline, tracing.caller(request.headers))
        except Rejected as rejected:
            service.metrics.rejects.labels(rejected.reason).inc()
            raise busy(rejected) from None
        size = size_name(images[0])
        headers = {"X-Job-Id": job, "Cache-Control": "no-store"}
        if body.stream:
            stream = events(engine, settings.name, size, job, asked)
            begun = await begin(stream, service.jobs.running(job, client, asked.rows))
            return StreamingResponse(begun, media_type="text/event-stream", headers=headers)
        with service.jobs.running(job, client, asked.rows):
            pictures = [picture(engine, settings.name, row) for row in asked.rows]
            done = await _unless_gone(request, asyncio.gather(*pictures))
        data = []
        for content, described in done:
            if body.response_format == "url":
                name = await asyncio.to_thread(service.pictures.keep, content)
                data.append({"url": str(request.url_for("image", name=name)), "provenance": described})
            else:
                data.append({"b64_json": base64.b64encode(content).decode(), "provenance": described})
        answer = {"created": int(time.time()), "data": data, "job": job, "size": size, "output_format": "png"}
        return JSONResponse(answer, headers=headers)

    @app.delete("/v1/jobs/{job}", responses=ERRORS)
    async def cancel(job: str, client: Client) -> dict[str, Any]:
        """Give up a request in flight, by its `X-Job-Id`; its slots are free at the next step."""
        cancelled = service.jobs.cancel(job, client)
        if cancelled == NOT_HERE and everywhere is not None:
            cancelled = await everywhere.cancel(job, client)
        if cancelled == NOT_HERE:
            raise ApiError(404, f"no job {job!r} of yours is in flight", code="job_not_found")
        return {"id": job, "object": "job", "cancelled_images": cancelled}

    @app.get("/v1/images/{name}", responses=ERRORS)
    def image(name: str) -> Response:
        """An image that was asked for as a URL; its unguessable name is the permission."""
        return Response(service.pictures.read(name), media_type="image/png")

    @app.get("/v1/models", responses=ERRORS)
    async def models(client: Client) -> dict[str, Any]:
        return {"object": "list", "data": [model_entry(service)]}

    @app.get("/v1/models/{name}", responses=ERRORS)
    async def model(name: str, client: Client) -> dict[str, Any]:
        if name != settings.name:
            raise ApiError(404, f"no model {name!r}; there is: {settings.name}", code="model_not_found")
        return model_entry(service)

    @app.post("/v1/encoders/refresh", responses=ERRORS, status_code=202)
    async def refresh(request: Request, authorization: Annotated[str | None, Header()] = None) -> dict[str, Any]:
        """A hint that an alias has moved: look now. Replicas look every `poll_seconds` anyway.

        For token holders, and for webhooks of MLflow that are signed with the secret in CRAFTOR_WEBHOOK_SECRET.
        """
        if not from_mlflow(request.headers, await request.body()):
            service.gate.client(authorization)
        service.watcher.hint()
        if everywhere is not None:
            await everywhere.look()
        return {"object": "refresh", "poll_seconds": settings.poll_seconds}

    @app.get("/v1/encoders", responses=ERRORS)
    async def encoders(client: Client) -> dict[str, Any]:
        """What can be mixed: each name's version now, where it acts by default, and what was measured of it."""
        data = [encoder_entry(service, name, encoder) for name, encoder in service.library.table.items()]
        return {"object": "list", "data": data}


def _operations(app: FastAPI, service: Service, everywhere: Everywhere | None) -> None:
    @app.get("/healthz", include_in_schema=False)
    async def healthy() -> JSONResponse:
        """Whether this process should live on."""
        alive = service.engine.alive
        return JSONResponse({"alive": alive}, 200 if alive else 503)

    @app.get("/readyz", include_in_schema=False)
    async def ready() -> JSONResponse:
        """Whether requests should come here; what is not as it should be, though it serves on."""
        alive, problems = service.engine.alive, service.problems
        versions = {name: encoder.uri for name, encoder in service.library.table.items()}
        body = {"ready": alive, "degraded": bool(problems), "problems": problems, "encoders": versions}
        return JSONResponse(body, 200 if alive else 503)

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        text = service.metrics.text() if everywhere is None else together(await everywhere.metrics())
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def _playground(app: FastAPI) -> None:
    page = files("craftor.serving").joinpath("static/playground.html").read_text(encoding="utf-8")

    @app.get("/playground", include_in_schema=False)
    async def playground() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY})

    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        return Response(status_code=307, headers={"Location": "/playground"})


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {"application/json": {"schema": {"type": "object"}}}}
    for status, text in (
        (400, "What the request asks for is not possible; the error names the parameter"),
        (401, "Token missing or not known"),
        (404, "No such thing"),
        (409, "The job id is in use"),
        (413, "The body is too large"),
        (429, "Too much to do; `Retry-After` says when to ask again"),
    )
}
POLICY = "default-src 'self'; img-src 'self' data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def _document_what_is_answered(app: FastAPI) -> None:
    """FastAPI documents a 422 for every route; here such requests are answered with 400."""
    for path in app.openapi()["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)


async def _unless_gone(request: Request, work: "asyncio.Future[list[Any]]") -> list[Any]:
    """The work's result; given up when the client hangs up."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    left = asyncio.ensure_future(gone())
    try:
        both: set[asyncio.Future[Any]] = {work, left}
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ApiError(499, "the client hung up", code="cancelled")
        return work.result()
    finally:
        left.cancel()
        work.cancel()
        with suppress(asyncio.CancelledError):
            await left
