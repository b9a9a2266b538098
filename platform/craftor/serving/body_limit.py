"""No body is read beyond a limit, whatever its headers say."""

from collections.abc import Mapping
from types import MappingProxyType

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from craftor.serving.errors import ApiError


class BodyLimit:
    """ASGI middleware: 413 in the usual shape, by `Content-Length` before the body or by counting as it comes."""

    def __init__(self, app: ASGIApp, limit: int, others: Mapping[str, int] = MappingProxyType({})) -> None:
        """`others` are limits by path, instead of the usual one."""
        self.app, self.limit, self.others = app, limit, others

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        said = dict(scope["headers"]).get(b"content-length", b"0")
        limit = self.others.get(scope["path"], self.limit)
        too_large = ApiError(413, f"the body is over {limit} bytes", code="body_too_large")
        if not said.isdigit() or int(said) > limit:
            await too_large.response()(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > limit:
                raise HTTPException(413, str(too_large))  # the one kind that FastAPI lets through while it reads
            return message

        await self.app(scope, counted, send)
