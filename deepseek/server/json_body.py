"""Strict JSON bodies: media type, encoding, size and shape are checked before any field."""

import asyncio
import json
import math
from collections import Counter
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from fastapi.routing import APIRoute
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import Response

from deepseek.packs.manifest import printable
from deepseek.server.errors import ApiError

MAX_DEPTH = 100
"""Maximum nesting depth of a body, because templates and grammars recurse over it."""

MAX_KEYS = 1 << 14
"""Maximum number of keys of one object, because each unknown key is one error to report."""

THREADED = 1 << 16
"""Size in bytes above which a body is parsed in a thread, so that other streams continue."""

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class JsonRequest(Request):
    """A request whose body is read by `parsed`."""

    async def json(self) -> Any:
        """Return the parsed body.

        Raises:
            ApiError: see `parsed`.
        """
        if not hasattr(self, "_parsed"):
            body = await self.body()
            large = len(body) > THREADED
            self._parsed = await asyncio.to_thread(parsed, body) if large else parsed(body)
        return self._parsed


class JsonRoute(APIRoute):
    """A route that reads its body, if it has one, as strict JSON of the right media type."""

    checks_media_type = True

    def get_route_handler(self) -> Handler:
        """Return FastAPI's handler with the checks of the body in front of it."""
        handler = super().get_route_handler()
        reads_body = self.body_field is not None

        async def handle(request: Request) -> Response:
            if reads_body and not self.checks_media_type:
                # FastAPI parses a body only if its header says JSON.
                MutableHeaders(scope=request.scope)["content-type"] = "application/json"
            strict = JsonRequest(request.scope, request.receive)
            if reads_body:
                check_media_type(strict.headers.get("content-type", ""))
                await strict.json()  # outside FastAPI's own error handling, which hides the cause
            return await self.answer(handler, strict)

        return handle

    async def answer(self, handler: Handler, request: Request) -> Response:
        """Return the handler's reply to a request whose body has been read."""
        return await handler(request)


class AnyTypeRoute(JsonRoute):
    """A route that reads its body as strict JSON whatever its media type.

    The documentation of Ollama and llama.cpp uses `curl -d` without a header. Pages of other sites
    are refused by their origin, so security does not depend on the type.
    """

    checks_media_type = False


def check_media_type(content_type: str) -> None:
    """Raise `ApiError` (415) unless a `Content-Type` header names JSON."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind != "application/json" and not (
        kind.startswith("application/") and kind.endswith("+json")
    ):
        raise ApiError(
            415,
            "The body must be JSON; send the header 'Content-Type: application/json'.",
            code="unsupported_media_type",
        )


def parsed(body: bytes, what: str = "body") -> Any:
    """Return the value of a JSON text as RFC 8259 defines it.

    Args:
        body: the text in UTF-8.
        what: what messages call it; default: "body".

    Raises:
        ApiError: the text is empty, is not UTF-8 or not JSON, repeats a key, has a lone
            surrogate, or exceeds `MAX_DEPTH` or `MAX_KEYS`.
    """
    if not body:
        raise refused(f"The {what} is empty; send a JSON object.")
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise refused(f"The {what} is not UTF-8 text; send JSON in UTF-8.") from None
    try:
        value = json.loads(
            text,
            object_pairs_hook=partial(_unique, what),
            parse_constant=_no_constant,
            parse_float=_finite,
        )
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise refused(
            f"The {what} is not valid JSON (line {error.lineno}, column {error.colno}); correct it."
        ) from None
    except UnicodeEncodeError:
        raise refused(
            f"The {what} has half of a surrogate pair, which is no character; send whole "
            "characters."
        ) from None
    except RecursionError:
        raise _too_deep(what) from None
    except ValueError:  # Python's limit on the digits of an integer
        raise refused(f"The {what} has a number with too many digits; shorten it.") from None
    if deeper(value, MAX_DEPTH):
        raise _too_deep(what)
    return value


def deeper(value: Any, levels: int) -> bool:
    """Return whether lists and objects nest more than `levels` deep in a JSON value."""
    containers = [value] if isinstance(value, dict | list) else []
    for _ in range(levels):
        containers = [part for container in containers for part in _containers(container)]
    return bool(containers)


def refused(message: str) -> ApiError:
    """Return the error for a text that is not acceptable JSON."""
    return ApiError(400, message, code="invalid_json")


def _containers(value: Any) -> list[Any]:
    parts = value.values() if isinstance(value, dict) else value
    return [part for part in parts if isinstance(part, dict | list)]


def _unique(what: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_KEYS:
        raise refused(f"An object in the {what} has more than {MAX_KEYS} keys; send fewer.")
    value = dict(pairs)
    if len(value) < len(pairs):
        (key, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise refused(
            f"An object in the {what} has the key {printable(key[:100])!r} twice; send it once."
        )
    return value


def _no_constant(name: str) -> Any:
    raise refused(f"{name} is not JSON; send a finite number.")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise refused(f"{digits:.40} is more than a number can be; send a smaller one.")
    return value


def _too_deep(what: str) -> ApiError:
    return refused(f"The {what} nests more than {MAX_DEPTH} levels deep; flatten it.")
