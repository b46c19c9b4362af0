"""HTTP/1.1 connections: time limits for everything that a client can delay, and replies to
malformed requests.

Uvicorn's protocol waits forever for the head of a request, and answers a malformed one in plain
text with a line in the log.
"""

import asyncio
import json
import sys
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from deepseek.server.errors import ApiError

HEAD_SECONDS = 10.0
"""Time limit for the head of a request, and for a body that is being discarded."""

IDLE_SECONDS = 30
"""Time limit for the next request on a connection."""

WRITE_SECONDS = 60.0
"""Time limit for a client to read `LEAST_READ` when the connection's send buffer is full."""

LEAST_READ = 1 << 20
"""Bytes; a client that reads fewer would hold the memory of a large reply for hours."""

MAX_HEAD = 1 << 14
"""Maximum size of a request's head in bytes."""

MAX_CONNECTIONS = 512
"""Maximum number of connections; below the usual limit of 1,024 open files."""

MALFORMED = {
    431: f"The request's head is longer than {MAX_HEAD} bytes; shorten it.",
    501: "The transfer encoding is not supported; send Content-Length, or chunks.",
}


class Connection(H11Protocol):
    """One connection, which is closed when the client is too slow.

    A timer runs while the server waits for a head, and while it discards a body after its reply.
    A body that is read has the limits of `LimitedBody`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            self._refuse(503, "Too many connections are open; try again in a moment.")
        self._set_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        discarding = self.conn.our_state is h11.DONE
        super().data_received(data)
        if discarding and self._is_idle():
            # Uvicorn ends its timer with the first bytes, but these were of a refused body.
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )
        self._set_head_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._set_head_timer()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._set_write_timer()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()

    def send_400_response(self, msg: str) -> None:
        error = sys.exception()  # Uvicorn calls this while it handles h11's error
        status = getattr(error, "error_status_hint", 400)
        self._refuse(
            status, MALFORMED.get(status, "The request is not valid HTTP/1.1; correct it.")
        )

    def _unsupported_upgrade_warning(self) -> None:
        """Log nothing: an upgrade is only an offer, and the connection continues with HTTP."""

    def _is_idle(self) -> bool:
        """Return whether the next request may begin, and no byte of it has come."""
        states = (self.conn.our_state, self.conn.their_state)
        return states == (h11.IDLE, h11.IDLE) and not self.conn.trailing_data[0]

    def _set_head_timer(self) -> None:
        """Start the timer if the server waits for the client, else stop it.

        Received bytes do not restart it, so a client cannot prolong it by sending single bytes.
        """
        replying = self.cycle is not None and not self.cycle.response_complete
        if replying or self.timeout_keep_alive_task is not None:
            if self._head_timer is not None:
                self._head_timer.cancel()
            self._head_timer = None
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self._too_slow)

    def _set_write_timer(self) -> None:
        """Start the timer within which the send buffer must shrink by `LEAST_READ`, or be read.

        A large reply is one write, so it is the buffer that tells whether the client reads.
        """
        unsent = self.transport.get_write_buffer_size()
        self._write_timer = self.loop.call_later(WRITE_SECONDS, self._check_reading, unsent)

    def _check_reading(self, unsent: int) -> None:
        if self.transport.get_write_buffer_size() <= unsent - LEAST_READ:
            self._set_write_timer()
        else:
            self.transport.abort()

    def _too_slow(self) -> None:
        self._refuse(408, f"The request's head took longer than {HEAD_SECONDS:g} s; send it whole.")

    def _refuse(self, status: int, message: str) -> None:
        """Close the connection, with an error reply if a reply has not begun."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and not self.transport.is_closing():
            error = ApiError(status, message, code="invalid_http" if status < 500 else None)
            content = json.dumps(error.body()).encode()
            headers = {
                "content-type": "application/json",
                "content-length": str(len(content)),
                "connection": "close",
                **error.headers,
            }
            reply = h11.Response(status_code=status, headers=list(headers.items()))
            for event in (reply, h11.Data(data=content), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def http_config(app: ASGIApp, **options: Any) -> uvicorn.Config:
    """Return Uvicorn's configuration for `app`.

    Args:
        app: the application.
        options: further options of Uvicorn.
    """
    return uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        h11_max_incomplete_event_size=MAX_HEAD,
        timeout_keep_alive=IDLE_SECONDS,
        log_config=None,
        log_level="error",  # a warning for each malformed request would let clients fill the log
        access_log=False,
        server_header=False,
        **options,
    )
