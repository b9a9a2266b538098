"""Whatever goes wrong -> the error shape of OpenAI's API, with the parameter that is at fault."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from craftor.serving.admission import Rejected

TYPES = {
    401: "authentication_error",
    429: "rate_limit_error",
    499: "cancelled",
    500: "server_error",
    503: "server_error",
}
"""By status; every other is an `invalid_request_error`."""


class ApiError(Exception):
    """An answer other than success: what was wrong, the value and what is allowed, in words for the caller."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    @property
    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error")
        param = None if self.param is None else _sayable(self.param)
        return {"error": {"message": _sayable(str(self)), "type": kind, "param": param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def invalid(param: str, message: str) -> ApiError:
    """A value that is not allowed; the message need not repeat whose."""
    return ApiError(400, f"{param}: {message}", param=param, code="invalid_value")


def _sayable(text: str) -> str:
    """JSON can spell half a character (`"\\ud800"`), which no answer that quotes it could be sent with."""
    return text.encode("utf-8", "backslashreplace").decode()


def busy(rejected: Rejected) -> ApiError:
    """429: come back later."""
    headers = {"Retry-After": str(rejected.retry_after)}
    return ApiError(429, str(rejected), code=rejected.reason, headers=headers)


def install(app: FastAPI) -> None:
    """Answer every error of the app in one shape."""

    @app.exception_handler(ApiError)
    async def own(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        # Of a union's members the one that was meant is the one that was read furthest.
        return _invalid(max(error.errors(), key=lambda one: len(one["loc"]))).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return ApiError(error.status_code, message, headers=error.headers).response()

    @app.exception_handler(Exception)
    async def unforeseen(_: Request, error: Exception) -> JSONResponse:
        # The traceback goes to the log; what is inside the server is not the caller's to read.
        return ApiError(500, "the server failed; its log says why", code="internal_error").response()


def _invalid(error: Mapping[str, Any]) -> ApiError:
    """One pydantic error in words."""
    if error["type"] == "json_invalid":
        return ApiError(
            400, f"the body is not valid JSON: {error.get('ctx', {}).get('error', '')}", code="invalid_json"
        )
    # The members of a union show up in the location; a caller never wrote them.
    location = [str(part) for part in error["loc"][1:] if part not in ("float", "Portion")]
    param = ".".join(location) or None
    if error["type"] == "extra_forbidden":
        return ApiError(400, f"parameter not supported here: {param}", param=param, code="unknown_parameter")
    if error["type"] == "missing":
        return ApiError(400, f"missing parameter: {param or 'the body'}", param=param, code="missing_parameter")
    value = repr(error["input"])
    shown = "" if len(value) > 80 else f" (got {value})"
    message = error["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{param or 'the body'}: {message}{shown}", param=param, code="invalid_value")
