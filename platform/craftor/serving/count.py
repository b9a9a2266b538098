"""Count answers by route and status; the route's pattern, not the path, so that the labels are few."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from craftor.serving.metrics import Metrics


class CountAnswers:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = "none"

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        self.metrics.ongoing.inc()
        try:
            await self.app(scope, receive, noted)
        finally:
            self.metrics.ongoing.dec()
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, status).inc()
