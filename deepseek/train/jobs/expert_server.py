"""Client for the expert routes of a running server, used by `deepseek watch` and `deepseek expert
plug`.
"""

import json
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import Any
from urllib.parse import quote, urlsplit

from deepseek.errors import ConfigError, DataError

TIMEOUT = 60.0
"""Timeout of a request in seconds."""


class ExpertServer:
    """Client for the expert routes of a running server.

    Args:
        url: its address, such as `http://127.0.0.1:8000`.
        key: admin key; "": the server has none.

    Raises:
        ConfigError: `url` is not an HTTP address.
    """

    def __init__(self, url: str, key: str = "") -> None:
        if not _is_address(url):
            raise ConfigError(
                f"The server's address {url!r} is not understood; write it as "
                "http://127.0.0.1:8000."
            )
        self._url = url.rstrip("/")
        self._key = key

    def plugged_digest(self, name: str) -> str | None:
        """Return the content digest of the pack plugged under a name; None: none is plugged.

        Args:
            name: name of the expert.

        Raises:
            DataError: the server cannot be reached or refuses; the message says why.
        """
        listed = self._send("GET", "/v1/experts")
        try:
            return {one["name"]: str(one["digest"]) for one in json.loads(listed)["data"]}.get(name)
        except (ValueError, KeyError, TypeError):
            raise DataError(
                f"The server at {self._url} lists no experts; give the address of a `deepseek "
                "serve`."
            ) from None

    def plug(self, name: str) -> None:
        """Plug an expert's pack from the server's folder.

        Args:
            name: name of the expert.

        Raises:
            DataError: the server cannot be reached or refuses; the message says why.
        """
        self._send("POST", "/v1/experts", {"name": name})

    def unplug(self, name: str) -> None:
        """Unplug an expert.

        Args:
            name: its name.

        Raises:
            DataError: the server cannot be reached or refuses; the message says why.
        """
        self._send("DELETE", _route(name))

    def plug_again(self, name: str) -> None:
        """Plug an expert's pack from the server's folder, replacing the plugged one, if any.

        Whether the expert is armed does not change.

        Args:
            name: name of the expert.

        Raises:
            DataError: the server cannot be reached or refuses; the message says why.
        """
        self._send("POST", "/v1/experts", {"name": name, "replace": True})

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> bytes:
        data = None if body is None else json.dumps(body).encode()
        # The scheme is checked above.
        request = urllib.request.Request(self._url + path, data, method=method)  # noqa: S310
        request.add_header("Content-Type", "application/json")
        if self._key:
            request.add_header("Authorization", f"Bearer {self._key}")
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as reply:  # noqa: S310
                return bytes(reply.read())
        except urllib.error.HTTPError as error:
            raise DataError(
                f"The server refused {method} {path} ({error.code}): {_fault(error)}"
            ) from None
        # Not an HTTP server, or an address with characters that are invalid in a request.
        except (OSError, HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise DataError(
                f"The server at {self._url} cannot be reached ({reason}); start it with `deepseek "
                "serve`, or check --server."
            ) from None


def _is_address(url: str) -> bool:
    """Return whether a text is an HTTP or HTTPS address."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises if it is not a number
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname)


def _route(name: str) -> str:
    return f"/v1/experts/{quote(name, safe='')}"


def _fault(error: urllib.error.HTTPError) -> str:
    """Return the message of an error body in OpenAI's form, or else the beginning of the body."""
    try:
        body = error.read(4000).decode(errors="replace")
    except (OSError, HTTPException):
        return "it ended the connection"
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200]
