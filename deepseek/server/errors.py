"""What a refused request gets: a status and `{"error": {"message", "type", "param", "code"}}`, whatever refused it."""

import math
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from deepseek.errors import UserError
from deepseek.infer.request import EngineStoppedError, QueueFullError
from deepseek.packs.manifest import printable

TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 408: "timeout_error",
    409: "conflict_error", 429: "rate_limit_error", 503: "unavailable_error", 504: "timeout_error",
}  # fmt: skip

RETRY_SECONDS = 1
"""After which a client may try again where the queue was full or the server is loading."""


class ErrorDetail(BaseModel):
    """What was wrong, in one sentence; `param` names the field, `code` is for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every reply that is no success."""

    error: ErrorDetail


DOCUMENTED: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request is refused; the message says why."},
    "5XX": {"model": ErrorBody, "description": "The server cannot answer now."},
}


class ApiError(Exception):
    """Ends a request with `status` and one sentence."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        retry_after: float = RETRY_SECONDS,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = {"Retry-After": str(math.ceil(retry_after))} if status in (429, 503) else {}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"

    def body(self) -> dict[str, Any]:
        """Return the JSON body."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Return the reply."""
        return JSONResponse(self.body(), self.status, self.headers)


def as_api_error(error: Exception) -> ApiError:
    """Return what a client is told of `error`; of a defect of ours, no more than its kind."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), code="queue_full", retry_after=error.retry_after)
    if isinstance(error, EngineStoppedError):
        return ApiError(503, "The server is shutting down; ask another one.", code="draining")
    if isinstance(error, UnicodeEncodeError):  # half of a surrogate pair, which JSON can say and UTF-8 cannot
        return ApiError(400, "The request holds characters that are no Unicode text.", code="invalid_value")
    if isinstance(error, UserError):
        return ApiError(400, str(error), code="invalid_value")
    return ApiError(500, f"The server failed ({type(error).__name__}); its log says more.", code="internal_error")


def install(app: FastAPI) -> None:
    """Let every error of `app` end in an `ErrorBody`."""

    def known(_request: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response()

    def malformed(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return explained(error.errors()[0]).response()

    def plain(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        response = ApiError(error.status_code, f"{printable(error.detail).capitalize()}.").response()
        response.headers.update(error.headers or {})  # the methods that are allowed, after a 405
        return response

    for kind in (ApiError, UserError, UnicodeEncodeError, Exception):
        app.add_exception_handler(kind, known)
    app.add_exception_handler(RequestValidationError, malformed)
    app.add_exception_handler(HTTPException, plain)


def explained(mistake: dict[str, Any]) -> ApiError:
    """Return the refusal for one mistake that validation found, naming the field."""
    where = printable(".".join(str(part) for part in mistake["loc"][1:]))
    if mistake["type"] == "extra_forbidden":
        message, code = f"The field {where} is not supported; leave it out.", "unsupported_field"
    elif mistake["type"] == "json_invalid":
        message, code = "The body is not valid JSON.", "invalid_json"
    else:
        message, code = f"The field {where or 'body'} is invalid: {printable(mistake['msg'])}.", "invalid_value"
    return ApiError(400, message, param=where or None, code=code)
