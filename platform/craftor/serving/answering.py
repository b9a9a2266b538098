"""Images that were asked for -> the engine, and the answer: one JSON when all are done, or a stream of events."""

import asyncio
import base64
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from craftor.serving import tracing
from craftor.serving.admission import Rejected
from craftor.serving.errors import ApiError, busy
from craftor.serving.generation import begin, events, picture, submit
from craftor.serving.listing import size_name
from craftor.serving.schema import Asked, Edit
from craftor.serving.service import Service
from craftor.serving.work import ImageRequest


async def answer(
    service: Service,
    body: Asked,
    images: Sequence[ImageRequest],
    request: Request,
    client: str,
    job_id: str | None,
    deadline_ms: int | None,
) -> Response:
    """Take a request in, charge its client, and answer. Raises ApiError: 429 where too much waits, 409, 499, 503."""
    settings, engine = service.settings, service.engine
    if not engine.alive:
        raise ApiError(503, "this replica has failed; ask again", code="replica_failed")
    job = service.jobs.name(job_id)
    try:
        with service.gate.charge(client, sum(engine.cost(image) for image in images)):
            deadline = None if deadline_ms is None else deadline_ms / 1000
            asked = submit(engine, images, client, deadline, tracing.caller(request.headers))
    except Rejected as rejected:
        service.metrics.rejects.labels(rejected.reason).inc()
        raise busy(rejected) from None
    size = size_name(images[0])
    headers = {"X-Job-Id": job, "Cache-Control": "no-store"}
    if body.stream:
        kind = "image_edit" if isinstance(body, Edit) else "image_generation"
        stream = events(engine, settings.name, size, job, asked, kind)
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
    content = {"created": int(time.time()), "data": data, "job": job, "size": size, "output_format": "png"}
    return JSONResponse(content, headers=headers)


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
