"""The HTTP interface of one replica: OpenAI's images API with mixtures, and what operators need."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib.resources import files
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi_offline import FastAPIOffline

from craftor import __version__
from craftor.serving import errors, form, references
from craftor.serving.answering import answer
from craftor.serving.body_limit import BodyLimit
from craftor.serving.count import CountAnswers
from craftor.serving.errors import ApiError
from craftor.serving.jobs import NOT_HERE
from craftor.serving.listing import encoder_entry, model_entry
from craftor.serving.metrics import together
from craftor.serving.schema import Asked, Generation
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
    limits = settings.limits
    app.add_middleware(BodyLimit, limit=limits.body_bytes, others={"/v1/images/edits": limits.edit_bytes})
    app.add_middleware(CountAnswers, metrics=service.metrics)  # around the one before, whose answers count too
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
    settings = service.settings

    def client(authorization: Annotated[str | None, Header()] = None) -> str:
        return service.gate.client(authorization)

    Client = Annotated[str, Depends(client)]
    unpacking = asyncio.Lock()  # one form's pictures at a time: they may be large, and many may come at once

    @app.post("/v1/images/generations", responses=ERRORS)
    async def generate(
        body: Generation,
        request: Request,
        client: Client,
        x_job_id: Annotated[str | None, Header()] = None,
        x_deadline_ms: Annotated[int | None, Header(ge=1, le=86_400_000)] = None,
    ) -> Response:
        """Images of a prompt. `X-Deadline-Ms`: refuse at once (429) what cannot be done by then."""
        images = service.interpreter.images(body, _caller(service, body, request, client))
        return await answer(service, body, images, request, client, x_job_id, x_deadline_ms)

    @app.post("/v1/images/edits", responses=ERRORS, openapi_extra=form.document())
    async def edit(
        request: Request,
        client: Client,
        x_job_id: Annotated[str | None, Header()] = None,
        x_deadline_ms: Annotated[int | None, Header(ge=1, le=86_400_000)] = None,
    ) -> Response:
        """Images with the object of the pictures sent, in the scene of a prompt; `X-Deadline-Ms` as above."""
        if (encoder := service.object_encoder) is None:
            raise ApiError(404, NO_OBJECTS, code="object_encoder_not_found")
        found = await form.read(request)
        size = service.interpreter.size(found.body.size)
        async with unpacking:
            sent = await asyncio.to_thread(references.read, found, encoder, settings.limits, service.metrics, size)
        images = service.interpreter.images(found.body, _caller(service, found.body, request, client), sent)
        return await answer(service, found.body, images, request, client, x_job_id, x_deadline_ms)

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
        alive = service.alive
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


def _caller(service: Service, body: Asked, request: Request, client: str) -> str:
    """Who gets a canary or not: a token's owner may ask for many users; without tokens an address is the best."""
    address = request.client.host if request.client and not service.settings.tokens else ""
    return f"{client}/{body.user or address}"


NO_OBJECTS = (
    "this server has no object encoder, which would draw the object of an image: name one in the file that it serves, "
    "object_encoder = 'FOLDER' or 'NAME@ALIAS'"
)
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
