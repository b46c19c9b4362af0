"""Slow, silent and non-HTTP clients: each gets an error or is disconnected in time."""

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from live_server import Live, live

from deepseek.server import connection, guard
from deepseek.server.settings import Settings

HOST = b"Host: localhost\r\n"
POST = b"POST /v1/chat/completions HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\n"
SHORT = 0.6
"""Seconds of every time limit in these tests."""


@pytest.fixture(scope="module")
def hasty(served_folder: Path) -> Iterator[Live]:
    """A server with short time limits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connection, "HEAD_SECONDS", SHORT)
        patch.setattr(connection, "WRITE_SECONDS", SHORT)
        patch.setattr(guard, "BODY_SECONDS", SHORT)
        with live(served_folder, Settings()) as running:
            yield running


def open_socket(server: Live) -> socket.socket:
    """Connect to a server."""
    return socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])), timeout=30)


def told(server: Live, data: bytes) -> bytes:
    """Send bytes and return everything received until the server closes the connection."""
    with open_socket(server) as client:
        client.sendall(data)
        return read_all(client)


def read_all(client: socket.socket) -> bytes:
    """Return what a server sends until it closes the connection."""
    received = b""
    try:
        while piece := client.recv(1 << 16):
            received += piece
    except ConnectionError:
        pass
    return received


def check_error(reply: bytes, status: int) -> None:
    """Check that a reply is an error in our layout, and the only one."""
    head, _, body = reply.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), reply
    error = json.loads(body)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"].endswith(".")


MALFORMED = {
    "no HTTP": (b"NONSENSE\r\n\r\n", 400),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100) + b"\r\n\r\n", 400),
    "a header without a colon": (b"GET /health HTTP/1.1\r\n" + HOST + b"X\r\n\r\n", 400),
    "no host": (b"GET /health HTTP/1.1\r\n\r\n", 400),
    "two lengths": (POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n{}", 400),
    "a negative length": (POST + b"Content-Length: -1\r\n\r\n", 400),
    "a long header": (b"GET /health HTTP/1.1\r\n" + HOST + b"X: " + b"a" * 400_000, 431),
    "a long line": (b"GET /" + b"a" * 400_000, 431),
    "a wrong chunk": (POST + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n", 400),
    "an unknown coding": (POST + b"Transfer-Encoding: gzip\r\n\r\n", 501),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_no_http_gets_the_body_of_errors(
    hasty: Live, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    data, status = MALFORMED[name]
    with caplog.at_level(logging.WARNING):
        check_error(told(hasty, data), status)
    assert caplog.records == []  # otherwise any client could fill the log


@settings(max_examples=25)
@given(st.binary(min_size=1, max_size=200))
def test_any_bytes_get_one_answer_in_time(hasty: Live, data: bytes) -> None:
    began = time.monotonic()
    reply = told(hasty, data + b"\r\n\r\n")
    assert time.monotonic() - began < 20
    if reply:
        assert reply.startswith(b"HTTP/1.1 4"), reply


@pytest.mark.parametrize(
    "head", [b"", b"GET /hea", b"GET /health HTTP/1.1\r\nHost: local", b"GET / HTTP/1.1\r\n"]
)
def test_a_connection_without_a_whole_head_is_closed(hasty: Live, head: bytes) -> None:
    began = time.monotonic()
    reply = told(hasty, head)
    assert time.monotonic() - began >= SHORT / 2
    check_error(reply, 408)


def dripped(server: Live, start: bytes) -> bytes:
    """Send `start`, then one byte at a time while the server accepts it; return its reply."""
    with open_socket(server) as client:
        client.sendall(start)

        def drip() -> None:
            try:
                while True:
                    client.sendall(b"a")
                    time.sleep(SHORT / 10)
            except OSError:
                pass

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        return read_all(client)


@pytest.mark.parametrize(
    "start",
    [
        b"GET /health HTTP/1.1\r\nX: ",
        POST + b"Content-Length: 100000\r\n\r\n",
        b"POST /v1/experts/upload HTTP/1.1\r\n" + HOST + b"Content-Length: 100000\r\n\r\n",
        b"POST /login HTTP/1.1\r\n" + HOST + b"Content-Length: 1000\r\n\r\n",
    ],
)
def test_bytes_one_by_one_do_not_prolong_a_limit(hasty: Live, start: bytes) -> None:
    began = time.monotonic()
    check_error(dripped(hasty, start), 408)
    assert time.monotonic() - began < 20


def test_a_body_that_nobody_reads_is_not_awaited_for_ever(hasty: Live) -> None:
    """The reply (404) comes at once; the rest of the body then has a time limit too."""
    start = b"POST /v1/nothing HTTP/1.1\r\n" + HOST + b"Content-Length: 100000\r\n\r\n"
    assert b" 404 " in dripped(hasty, start)


@pytest.mark.parametrize(
    "field", [b"Content-Length: 10\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n"]
)
def test_a_request_without_a_body_announces_none(hasty: Live, field: bytes) -> None:
    head = b"GET /v1/models HTTP/1.1\r\nConnection: close\r\n" + HOST
    check_error(told(hasty, head + field), 400)


def test_a_client_that_does_not_read_is_let_go(hasty: Live) -> None:
    """When its buffer is full, its generation is cancelled."""
    before = hasty.engine.stats().finished.get("cancelled", 0)
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "a"}],
        "max_tokens": 700,
        "stream": True,
        "logprobs": True,
        "top_logprobs": 20,
        "logit_bias": {"0": -100, "2": -100},
        "n": 16,
    }
    content = json.dumps(body).encode()
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", int(hasty.url.rsplit(":", 1)[1])))
    with client:
        client.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(content) + content)
        deadline = time.monotonic() + 60
        while hasty.service.active == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        while hasty.service.active and time.monotonic() < deadline:
            time.sleep(0.05)
        assert hasty.service.active == 0
        # The engine cancels it between two steps, a moment after the server closed the connection.
        while hasty.engine.stats().running and time.monotonic() < deadline:
            time.sleep(0.05)
    assert hasty.engine.stats().finished.get("cancelled", 0) > before


def test_a_client_that_reads_slowly_gets_a_large_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: the limit was for the whole reply, which is one write."""
    monkeypatch.setattr(connection, "WRITE_SECONDS", 2 * SHORT)
    reply = bytes(1 << 24)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-length", b"%d" % len(reply))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": reply})

    def read(port: int) -> int:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
            client.connect(("127.0.0.1", port))
            client.sendall(b"GET / HTTP/1.1\r\nConnection: close\r\n" + HOST + b"\r\n")
            received = 0
            began = time.monotonic()
            while piece := client.recv(1 << 18):
                received += len(piece)
                behind = received / len(reply) * 5 * SHORT - (time.monotonic() - began)
                time.sleep(max(0.0, behind))
        return received

    async def served() -> int:
        config = connection.http_config(app, lifespan="off")
        config.load()
        server = uvicorn.Server(config)
        server.lifespan = config.lifespan_class(config)
        listening = socket.create_server(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        serving = asyncio.create_task(server.serve([listening]))
        try:
            return await asyncio.to_thread(read, port)
        finally:
            server.should_exit = True
            await serving

    assert asyncio.run(served()) > len(reply)


def test_a_refused_request_does_not_end_an_idle_connection(hasty: Live) -> None:
    """Regression: the rest of its body started the limit of the next head, with an answer (408)."""
    with open_socket(hasty) as client:
        client.sendall(b"POST /v1/nothing HTTP/1.1\r\n" + HOST + b"Content-Length: 4\r\n\r\n")
        assert b" 404 " in client.recv(1 << 16).partition(b"\r\n")[0]
        client.sendall(b"body")
        client.settimeout(3 * SHORT)
        with pytest.raises(TimeoutError):
            client.recv(1 << 16)
        client.settimeout(30)
        client.sendall(b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n")
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 200")


def test_connections_have_a_limit(hasty: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "MAX_CONNECTIONS", 3)
    held = [open_socket(hasty) for _ in range(3)]
    time.sleep(0.1)
    try:
        check_error(told(hasty, b""), 503)
    finally:
        for client in held:
            client.close()
    time.sleep(0.2)
    with hasty.http() as http:
        assert http.get("/health").status_code == 200


def test_a_connection_is_kept_for_the_next_request(hasty: Live) -> None:
    request = b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n"
    with open_socket(hasty) as client:
        for _ in range(3):
            client.sendall(request)
            assert client.recv(1 << 16).startswith(b"HTTP/1.1 200")
            time.sleep(SHORT / 3)


def test_an_upgrade_is_an_offer_that_need_not_be_taken(hasty: Live) -> None:
    offer = b"Connection: upgrade, close\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\r\n"
    assert b"HTTP/1.1 200" in told(hasty, b"GET /health HTTP/1.1\r\n" + HOST + offer)
