"""Count answers by route and status; the route's pattern, not the path, so that the labels are few."""

from asyncio import CancelledError

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from craftor.serving.metrics import Metrics

NO_ANSWER = "none"


class CountAnswers:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = NO_ANSWER

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        self.metrics.ongoing.inc()
        try:
            await self.app(scope, receive, noted)
        except CancelledError:
            raise  # whoever asked has hung up
        except BaseException:
            if status == NO_ANSWER:
                status = "500"  # what Starlette answers, outside of all middleware
            raise
        finally:
            self.metrics.ongoing.dec()
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, status).inc()
