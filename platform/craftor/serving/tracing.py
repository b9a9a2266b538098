"""OpenTelemetry spans of images, where an operator has configured a tracer; elsewhere the calls do nothing.

Each image is a span under its caller's trace, with its time in the queue, under way and in the decoder as spans below
it. One UNet call serves many requests, so it is no span of any of them: `metrics` counts those.
"""

import time
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any
from weakref import ref

from opentelemetry import trace
from opentelemetry.context import Context, get_current
from opentelemetry.propagate import extract

from craftor import __version__
from craftor.serving.work import Row

TRACER = trace.get_tracer("craftor", __version__)


def caller(headers: Mapping[str, str]) -> Context:
    """The trace a request belongs to: of the span around it (Ray Serve's, where that traces), or its `traceparent`."""
    here = get_current()
    return here if trace.get_current_span(here).get_span_context().is_valid else extract(headers, here)


def ended(reference: "ref[Row]", context: Context, done: "Future[Any]") -> None:
    """A row's spans, when it is done, however that came."""
    row = reference()
    assert row is not None, "whoever ends a row holds it"
    now = time.time_ns()
    offset = now - int(time.monotonic() * 1e9)

    def at(moment: float) -> int:
        """A row's clock is monotonic, a span's the wall's."""
        return offset + int(moment * 1e9)

    request = row.request
    attributes: dict[str, Any] = {
        "craftor.encoders": [share.encoder.uri for share in request.shares],
        "craftor.weights": [share.weight for share in request.shares],
        "craftor.object_encoder": request.shown.encoder.uri if request.shown else "",
        "craftor.steps": row.taken,
        "craftor.guidance_scale": request.guidance_scale,
        "craftor.seed": request.seed,
    }
    span = TRACER.start_span("craftor.image", context, start_time=at(row.submitted), attributes=attributes)
    below = trace.set_span_in_context(span, context)
    parts = {"queue": row.submitted, "denoise": row.started, "decode": row.denoised}
    begun = {name: at(moment) for name, moment in parts.items() if moment is not None}
    for (name, start), end in zip(begun.items(), [*list(begun.values())[1:], now], strict=True):
        TRACER.start_span(f"craftor.{name}", below, start_time=start).end(end)
    if (error := done.exception()) is not None:
        span.set_status(trace.StatusCode.ERROR, str(error))
    span.end(now)
