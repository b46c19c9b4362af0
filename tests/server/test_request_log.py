"""The request log: one line per request, without content, keys or client-chosen names."""

import json
import logging
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from live_server import Live
from log_lines import LOGGER, logged
from waiting import wait_for

from deepseek.server.request_log import configure

SECRET = "a secret of the client"


@pytest.mark.parametrize(
    ("path", "body", "pattern"),
    [
        ("/v1/completions", {"prompt": SECRET, "max_tokens": 3}, r"200 \d+\+3 tokens \d+ ms"),
        ("/v1/embeddings", {"input": SECRET}, r"200 \d+\+0 tokens \d+ ms"),
        ("/v1/completions", {"prompt": SECRET, SECRET: 1}, r"400 \d+ ms"),
    ],
)
def test_a_request_is_a_line(
    server: Live, caplog: pytest.LogCaptureFixture, path: str, body: dict[str, object], pattern: str
) -> None:
    with caplog.at_level(logging.INFO, LOGGER), server.http(SECRET.replace(" ", "")) as http:
        http.post(path, json={"model": "tiny", **body})
        lines = logged(caplog, 1)
    assert lines[0].startswith(f"POST {path} ")
    assert re.search(pattern, lines[0])
    assert SECRET not in lines[0]


def test_a_path_of_a_client_is_not_logged(server: Live, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, LOGGER), server.http() as http:
        http.get("/v1/models/secret-name")
        http.get("/secret-path")
        lines = logged(caplog, 2)
    assert sorted(line.split()[1] for line in lines) == ["/v1/models/{model:path}", "other"]
    assert not any("secret" in line for line in lines)


@contextmanager
def asked(server: Live, route: str, content: str) -> Iterator[None]:
    """Send a request whose client disconnects at the end of the block."""
    with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as client:
        client.sendall(
            f"POST {route} HTTP/1.1\r\nHost: localhost\r\n"
            "Content-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\n\r\n{content}".encode()
        )
        yield


def test_a_client_that_leaves_is_no_failure_of_the_server(
    server: Live, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is sent to the client, so its request has no real status."""
    content = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 700, "ignore_eos": True})
    with caplog.at_level(logging.INFO, LOGGER):
        with asked(server, "/v1/completions", content):
            wait_for(lambda: server.engine.stats().running)
        lines = logged(caplog, 1)
    assert lines[0].startswith("POST /v1/completions 499 ")
    assert '{route="/v1/completions",status="499"} 1.0' in server.service.metrics.text().decode()


def test_a_client_that_leaves_while_its_prompt_is_made_is_none_either(
    server: Live, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Editors cancel a request at each keystroke."""
    planning, left = threading.Event(), threading.Event()

    def slow(*_: object) -> list[int]:
        planning.set()
        left.wait(20)
        return [5]

    monkeypatch.setattr(server.service.writer, "gap", slow)
    content = json.dumps({"prompt": "a"})
    with caplog.at_level(logging.INFO, LOGGER):
        with asked(server, "/infill", content):
            assert planning.wait(20)
        lines = logged(caplog, 1)
        left.set()
    assert lines[0].startswith("POST /infill 499 ")


def test_a_failure_of_the_server_is_one(
    server: Live, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.service, "models", None)
    with caplog.at_level(logging.INFO, LOGGER), server.http() as http:
        assert http.get("/v1/models").status_code == 500
        lines = logged(caplog, 1)
    assert lines[0].startswith("GET /v1/models 500 ")


def test_the_level_decides_what_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    configure("warning")
    logging.getLogger(LOGGER).info("not written")
    logging.getLogger("deepseek.server.errors").warning("a warning")
    written = capsys.readouterr().err
    assert "a warning" in written
    assert "not written" not in written
