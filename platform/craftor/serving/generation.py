"""Rows in the engine -> the answer: all images at once, or events as they come."""

import asyncio
import base64
import json
import time
import weakref
from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractContextManager, aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from jaxtyping import Float
from opentelemetry.context import Context
from torch import Tensor

from craftor.serving import tracing
from craftor.serving.admission import Rejected
from craftor.serving.engine import Engine
from craftor.serving.errors import ApiError, busy
from craftor.serving.provenance import png, record
from craftor.serving.work import Cancelled, EngineEnded, ImageRequest, Row

Event = tuple[int, int, Float[Tensor, "3 H W"]]
"""(which row, its step, the preview)."""


@dataclass
class Asked:
    """One request's rows, with what they show on the way."""

    rows: list[Row]
    previews: "asyncio.Queue[Event]" = field(default_factory=asyncio.Queue)


def submit(
    engine: Engine, requests: Sequence[ImageRequest], client: str, deadline: float | None, trace: Context
) -> Asked:
    """Hand requests to the engine. Raises Rejected."""
    loop = asyncio.get_running_loop()
    asked = Asked([])

    def listen(which: int) -> Any:
        """Called from the decoder's thread."""
        return lambda step, image: loop.call_soon_threadsafe(asked.previews.put_nowait, (which, step, image))

    listeners = [listen(i) if request.previews else None for i, request in enumerate(requests)]
    asked.rows = engine.submit(requests, client=client, deadline=deadline, listeners=listeners)
    for row in asked.rows:
        # Weakly: a row whose own future holds it waits, picture and all, for the garbage collector.
        row.done.add_done_callback(partial(tracing.ended, weakref.ref(row), trace))
    return asked


def describe(engine: Engine, model: str, row: Row) -> dict[str, Any]:
    """The row's provenance; what the engine is belongs to it, for bytes depend on it."""
    settings = engine.settings
    own: dict[str, Any] = {"mode": settings.mode, "bucket": engine.capacity, "threads": settings.threads}
    own["precision"] = str(engine.base.precision).removeprefix("torch.")
    if engine.base.compile:
        own["compiled"] = True
    if row.request.control is not None and engine.controlnet is not None:
        own["controlnet"] = engine.controlnet.sha256
    return record(row, model, own)


async def finished(row: Row) -> Float[Tensor, "3 H W"]:
    """A row's image. Raises ApiError where it was given up or came too late."""
    done = asyncio.wrap_future(row.done)
    done.add_done_callback(
        lambda ended: ended.cancelled() or ended.exception()
    )  # a row that nobody awaits any more may fail in silence
    try:
        return await asyncio.shield(done)
    except EngineEnded:
        raise ApiError(503, "this replica has failed; ask again", code="replica_failed") from None
    except Cancelled:
        raise ApiError(499, "the job was cancelled", code="cancelled") from None
    except Rejected as late:
        raise busy(late) from None


async def picture(engine: Engine, model: str, row: Row) -> tuple[bytes, dict[str, Any]]:
    """A row's PNG and provenance, when it is done."""
    image, described = await finished(row), describe(engine, model, row)
    return await asyncio.to_thread(png, image, described), described


async def events(
    engine: Engine, model: str, size: str, job: str, asked: Asked, kind: str
) -> AsyncGenerator[bytes, None]:
    """Server-sent events in OpenAI's names, which begin with `kind`: previews as they come, each image when done."""
    pictures = [asyncio.ensure_future(picture(engine, model, row)) for row in asked.rows]
    preview = asyncio.ensure_future(asked.previews.get())
    shown = dict.fromkeys(range(len(pictures)), 0)
    common = {"job": job, "size": size, "output_format": "png", "quality": "auto", "background": "opaque"}
    try:
        yield b": " + job.encode() + b"\n\n"
        left = dict(enumerate(pictures))
        while left:
            done, _ = await asyncio.wait({preview, *left.values()}, return_when=asyncio.FIRST_COMPLETED)
            if preview in done:
                shows = [preview.result()]
                while not asked.previews.empty():  # all that came before a picture, before it
                    shows.append(asked.previews.get_nowait())
                preview = asyncio.ensure_future(asked.previews.get())
                for which, step, image in shows:
                    own = {"partial_image_index": shown[which], "step": step, "image_index": which}
                    shown[which] += 1
                    yield event(f"{kind}.partial_image", common | own, await asyncio.to_thread(png, image))
            for which in [i for i, picture_ in left.items() if picture_ in done]:
                data, described = left.pop(which).result()
                last: dict[str, Any] = {"image_index": which, "provenance": described}
                yield event(f"{kind}.completed", common | last, data)
    except ApiError as error:
        yield b"event: error\ndata: " + json.dumps({"type": "error", **error.body}).encode() + b"\n\n"
    finally:
        preview.cancel()
        for picture_ in pictures:
            picture_.cancel()


async def begin(stream: AsyncGenerator[bytes, None], job: AbstractContextManager[None]) -> AsyncGenerator[bytes, None]:
    """The same stream inside `job`, which it has entered on return and leaves when it ends, whether it is read or not.

    A generator of which nothing was read is dropped without its `finally`; so this one's first part is read here.
    """

    async def inside() -> AsyncGenerator[bytes, None]:
        with job:
            async with aclosing(stream):
                async for part in stream:
                    yield part

    async def rest(first: bytes, others: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        async with aclosing(others):
            yield first
            async for part in others:
                yield part

    entered = inside()
    return rest(await anext(entered), entered)


def event(kind: str, body: dict[str, Any], image: bytes) -> bytes:
    content = {"type": kind, "created_at": int(time.time()), **body, "b64_json": base64.b64encode(image).decode()}
    return f"event: {kind}\ndata: {json.dumps(content)}\n\n".encode()
