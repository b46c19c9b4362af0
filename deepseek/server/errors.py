"""Error replies: every failure becomes a status and `{"error": {"message", "type", "param",
"code"}}`.
"""

import math
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from deepseek.engine.request import EngineStoppedError, QueueFullError
from deepseek.errors import UserError
from deepseek.packs.manifest import printable

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    429: "rate_limit_error",
    503: "unavailable_error",
    504: "timeout_error",
}

RETRY_SECONDS = 1
"""Default of the `Retry-After` header, in seconds, when the queue is full or the model loads."""


class ErrorDetail(BaseModel):
    """The error in one sentence; `param` names the field, `code` is for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every error reply."""

    error: ErrorDetail


DOCUMENTED: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request was refused; the message says why."},
    "5XX": {"model": ErrorBody, "description": "The server cannot answer now."},
}


class ApiError(Exception):
    """Ends a request with an error reply.

    Args:
        status: HTTP status.
        message: the error in one sentence, with what to do.
        param: the field at fault; default: none.
        code: identifier for programs; default: none.
        retry_after: seconds in the `Retry-After` header of status 429 and 503.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float = RETRY_SECONDS,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = {"Retry-After": str(math.ceil(retry_after))} if status in (429, 503) else {}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"

    def body(self) -> dict[str, Any]:
        """Return the JSON body."""
        kind = TYPES.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        return {
            "error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        }

    def response(self) -> JSONResponse:
        """Return the HTTP reply."""
        return JSONResponse(self.body(), self.status, self.headers)


def explained(mistake: dict[str, Any]) -> ApiError:
    """Return the error reply for one Pydantic validation error, naming the field."""
    where = printable(".".join(str(part) for part in mistake["loc"][1:]))
    if mistake["type"] == "extra_forbidden":
        message = f"The field {where} is not supported; leave it out."
        code = "unsupported_field"
    elif mistake["type"] == "json_invalid":
        message = "The body is not valid JSON."
        code = "invalid_json"
    else:
        message = f"The field {where or 'body'} is invalid: {printable(mistake['msg'])}."
        code = "invalid_value"
    return ApiError(400, message, param=where or None, code=code)


def refused(error: HTTPException) -> ApiError:
    """Return Starlette's HTTP error as an `ApiError`."""
    refusal = ApiError(error.status_code, f"{printable(error.detail).capitalize()}.")
    refusal.headers |= error.headers or {}  # `Allow` after a 405
    return refusal


CONVERTERS: dict[type[Exception], Callable[[Any], ApiError]] = {
    ApiError: lambda error: error,
    QueueFullError: lambda error: ApiError(
        429, str(error), code="queue_full", retry_after=error.retry_after
    ),
    EngineStoppedError: lambda _: ApiError(
        503, "The server is shutting down; ask another one.", code="draining"
    ),
    UserError: lambda error: ApiError(400, str(error), code="invalid_value"),
    RequestValidationError: lambda error: explained(error.errors()[0]),
    HTTPException: refused,
    # A lone surrogate, which JSON can express and UTF-8 cannot.
    UnicodeEncodeError: lambda _: ApiError(
        400, "The request holds characters that are no Unicode text.", code="invalid_value"
    ),
    Exception: lambda error: ApiError(
        500,
        f"The server failed ({type(error).__name__}); its log says more.",
        code="internal_error",
    ),
}
"""Conversion of exceptions into error replies; the first matching type wins. For a bug in the
server, the client sees only the exception's name.
"""


def as_api_error(error: Exception) -> ApiError:
    """Return the error reply for any exception."""
    return next(convert(error) for kind, convert in CONVERTERS.items() if isinstance(error, kind))


def install(app: FastAPI) -> None:
    """Make every exception in `app` end in an `ErrorBody`."""

    def handle(_request: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response()

    for kind in CONVERTERS:
        app.add_exception_handler(kind, handle)
