"""Error replies: every failure becomes a status and `{"error": {"message", "type", "param",
"code"}}`.
"""

import errno
import logging
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from deepseek.engine.request import EngineStoppedError, GrammarCompilerError, QueueFullError
from deepseek.errors import UserError
from deepseek.packs.manifest import printable
from deepseek.server.field_errors import field_error

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    429: "rate_limit_error",
    503: "unavailable_error",
    504: "timeout_error",
    507: "unavailable_error",
}

CODES = {400: "invalid_value", 404: "not_found", 405: "method_not_allowed", 409: "conflict"}
"""Codes of errors that have none of their own."""

RETRIED = (429, 503, 504, 507)
"""Statuses whose replies say when to try again."""

CLIENT_LEFT = 499
"""Status in logs and metrics of a request whose client left before its reply began (as in nginx).
"""

ANTHROPIC_TYPES = {**TYPES, 413: "request_too_large", 503: "overloaded_error"}

RETRY_SECONDS = 1
"""Default of the `Retry-After` header, in seconds, when the queue is full or the model loads."""

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Error numbers of a disk that cannot store more data."""

LOG_SECONDS = 60.0
"""Minimum time between log lines about the same failure, as a full disk fails every request."""

log = logging.getLogger(__name__)


class ErrorDetail(BaseModel):
    """The error in one sentence; `param` names the field, `code` is for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every error reply."""

    error: ErrorDetail


class AnthropicError(BaseModel):
    """The error in one sentence, and its kind."""

    type: str
    message: str


class AnthropicErrorBody(BaseModel):
    """The body of every error reply under `/v1/messages`."""

    type: Literal["error"]
    error: AnthropicError


class OllamaErrorBody(BaseModel):
    """The body of every error reply under `/api`."""

    error: str


def documented(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI description of error replies with this body."""
    return {
        "4XX": {"model": model, "description": "The request was refused; the message says why."},
        "5XX": {"model": model, "description": "The server cannot answer now."},
    }


class ApiError(Exception):
    """Ends a request with an error reply.

    Args:
        status: HTTP status.
        message: the error in one sentence, with what to do.
        param: the field at fault; default: none.
        code: identifier for programs; default: that of the status in `CODES`, or none.
        retry_after: seconds in the `Retry-After` header of the statuses in `RETRIED`.
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
        # A file name can contain bytes that are not UTF-8.
        self.message = without_paths(message).encode(errors="replace").decode()
        self.param = param
        self.code = code or CODES.get(status)
        self.headers = {"Retry-After": str(math.ceil(retry_after))} if status in RETRIED else {}
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

    def response(self, path: str) -> JSONResponse:
        """Return the HTTP reply.

        Args:
            path: path of the request, which decides the layout (see `body_for`).
        """
        return JSONResponse(body_for(self, path), self.status, self.headers)


def body_for(error: ApiError, path: str) -> dict[str, Any]:
    """Return the JSON body of an error in the layout of the API that a path belongs to.

    Args:
        error: the error.
        path: path of the request: `/v1/messages` is Anthropic's, `/api/` is Ollama's, everything
            else OpenAI's.
    """
    if path.startswith("/v1/messages"):
        kind = ANTHROPIC_TYPES.get(
            error.status, "api_error" if error.status >= 500 else "invalid_request_error"
        )
        return {"type": "error", "error": {"type": kind, "message": error.message}}
    return {"error": error.message} if path.startswith("/api/") else error.body()


PATH = re.compile(r"(?<![\w.~/])/([\w.@~+-]+)(?:/[\w.@~+-]+)*/?")


def without_paths(message: str) -> str:
    """Return a message with only the last name of each path on this machine.

    Errors of the library contain full paths for its users, but clients must not see them. A text
    that only looks like a path, such as `/v1/models`, is kept.
    """

    def last(match: re.Match[str]) -> str:
        try:
            known = Path("/", match[1]).exists()
        except OSError:  # longer than a name can be
            known = False
        return Path(match[0]).name if known else match[0]

    return PATH.sub(last, message)


def explained(mistakes: Sequence[dict[str, Any]], body: Any) -> ApiError:
    """Return the error reply for Pydantic's validation errors; see `field_error`."""
    found = field_error(mistakes, body)
    return ApiError(400, found.message, param=found.field or None, code=found.code)


def not_routed(request: Request, error: HTTPException) -> ApiError:
    """Return the error for a path that no route has, or a method that its route does not take.

    Args:
        request: the request; its application's state has the routes and their paths.
        error: Starlette's error, with status 404 or 405.
    """
    path = request.url.path
    shown_path = printable(path[:100])
    if error.status_code == 405:
        methods = _methods(request)
        usable = " or ".join(methods) or "another method"
        refusal = ApiError(405, f"{shown_path} does not take {request.method}; use {usable}.")
        refusal.headers["Allow"] = ", ".join(methods)
        return refusal
    paths: frozenset[str] = request.app.state.paths
    if f"/v1{path}" in paths:
        mend = f"let the base URL end with /v1, so that this is /v1{shown_path}"
    elif path.removeprefix("/v1") in paths:
        mend = f"leave /v1 out of the base URL, so that this is {shown_path.removeprefix('/v1')}"
    else:
        mend = "/openapi.json describes the routes that there are"
    return ApiError(404, f"There is no route {shown_path}; {mend}.", code="unknown_route")


def _methods(request: Request) -> list[str]:
    """Return the methods of all routes with the path of a request; each method has its own."""
    methods: set[str] = set()
    for route in request.app.state.routes:
        if route.matches(request.scope)[0] is not Match.NONE:
            methods |= route.methods or set()
    return sorted(methods)


def refused(error: HTTPException) -> ApiError:
    """Return Starlette's HTTP error as an `ApiError`."""
    refusal = ApiError(error.status_code, f"{printable(error.detail).capitalize()}.")
    refusal.headers |= error.headers or {}
    return refusal


@contextmanager
def about(field: str) -> Iterator[None]:
    """Name the field at fault in the errors of a block that does not know it.

    Args:
        field: the field of the request.

    Raises:
        ApiError: in place of a `UserError`, or with `field` in place of another.
    """
    try:
        yield
    except ApiError as error:
        error.param = field
        raise
    except GrammarCompilerError:  # no fault of the field
        raise
    except UserError as error:
        raise ApiError(400, str(error), param=field) from None


def disk_full() -> ApiError:
    """Return the error reply for data that the server's disk has no space for."""
    return ApiError(
        507,
        "The server's disk is full, so nothing was stored; try again later.",
        code="disk_full",
        retry_after=60,
    )


def disk_failed(error: OSError) -> ApiError:
    """Return the error reply for a failure of the server's disk."""
    if error.errno in FULL:
        return disk_full()
    reason = error.strerror or type(error).__name__
    return ApiError(
        503, f"The server cannot use its disk ({reason}); try again later.", code="disk_failed"
    )


CONVERTERS: dict[type[Exception], Callable[[Any], ApiError]] = {
    ApiError: lambda error: error,
    QueueFullError: lambda error: ApiError(
        429, str(error), code="queue_full", retry_after=error.retry_after
    ),
    EngineStoppedError: lambda _: ApiError(
        503, "The server is shutting down; ask another one.", code="draining"
    ),
    # No fault of the client's grammar.
    GrammarCompilerError: lambda error: ApiError(500, str(error), code="internal_error"),
    UserError: lambda error: ApiError(400, str(error), code="invalid_value"),
    RequestValidationError: lambda error: explained(error.errors(), error.body),
    # A request of another API that has no equivalent in ours.
    ValidationError: lambda error: explained(
        [{**mistake, "loc": ("body", *mistake["loc"])} for mistake in error.errors()], None
    ),
    HTTPException: refused,
    ClientDisconnect: lambda _: ApiError(CLIENT_LEFT, "The client left before its reply began."),
    RecursionError: lambda _: ApiError(
        400, "The request nests too deep; flatten it.", code="invalid_value"
    ),
    OSError: disk_failed,
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

    logged: dict[str | None, float] = {}

    def handle(request: Request, error: Exception) -> JSONResponse:
        reply = as_api_error(error)
        now = time.monotonic()
        if isinstance(error, OSError) and now - logged.get(reply.code, -LOG_SECONDS) >= LOG_SECONDS:
            logged[reply.code] = now
            log.warning("%s (%s)", reply.message, error)
        return reply.response(request.url.path)

    def unknown(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return not_routed(request, error).response(request.url.path)

    for status in (404, 405):
        app.add_exception_handler(status, unknown)
    for kind in CONVERTERS:
        app.add_exception_handler(kind, handle)
