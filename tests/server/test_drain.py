"""A signal ends the server within the documented time, whatever it is doing; each test runs a real
process.
"""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from live_server import save_model
from waiting import wait_for

from deepseek.server import run
from deepseek.server.app import create_app
from deepseek.server.connection import http_config
from deepseek.server.run import END_SECONDS, DrainingServer
from deepseek.server.settings import Settings

DRAIN = 1.0
SLACK = 30.0
"""Seconds that a busy machine may add."""

ENDLESS: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "a"}],
    "n": 16,
    "max_tokens": 760,
    "stream": True,
    "logit_bias": {"0": -100, "2": -100},
    "logprobs": True,
    "top_logprobs": 20,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, and with text to teach."""
    folder = tmp_path_factory.mktemp("drain")
    save_model(folder / "tiny")
    (folder / "text").mkdir()
    for number in range(40):
        (folder / "text" / f"{number}.txt").write_text(f"the router {number} returns " * 200)
    return folder


@contextmanager
def process(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run `deepseek serve` until the block ends; yield the ready server and its address."""
    experts = folder / "experts"
    experts.mkdir(exist_ok=True)
    arguments = ["serve", str(folder / "tiny"), "--port", "0", "--experts-folder", str(experts)]
    arguments += ["--teach-root", str(folder / "text"), "--drain-seconds", str(DRAIN), *options]
    running = subprocess.Popen(
        [sys.executable, "-m", "deepseek", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert running.stdout is not None
    try:
        found = re.search(r"http://127\.0\.0\.1:\d+", running.stdout.readline())
        assert found, running.communicate()[1]
        wait_for(lambda: httpx.get(f"{found[0]}/ready", timeout=60).status_code == 200)
        yield running, found[0]
    finally:
        running.kill()
        running.communicate()


def end(running: subprocess.Popen[str]) -> float:
    """Send SIGTERM, check the exit code and return the seconds that the exit took."""
    began = time.monotonic()
    running.send_signal(signal.SIGTERM)
    assert running.wait(DRAIN + END_SECONDS + 2 + SLACK) == 0
    return time.monotonic() - began


def lines_of(url: str, path: str, body: Any, lines: list[str], started: threading.Event) -> None:
    """Collect the lines of a stream."""
    method = "GET" if body is None else "POST"
    with httpx.stream(method, url + path, json=body, timeout=120) as stream:
        for line in stream.iter_lines():
            if line:
                lines.append(line)
                started.set()


def followed(url: str, path: str, body: Any = None) -> tuple[threading.Thread, list[str]]:
    """Follow a stream in a thread; return once its first line has arrived."""
    lines: list[str] = []
    started = threading.Event()
    thread = threading.Thread(target=lines_of, args=(url, path, body, lines, started))
    thread.start()
    assert started.wait(120)
    return thread, lines


def children(pid: int) -> list[int]:
    """Return the processes that a process has started."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(number) for number in found.split()]


def test_a_stream_that_takes_too_long_ends_with_an_error_and_done(folder: Path) -> None:
    with process(folder) as (running, url):
        chat, lines = followed(url, "/v1/chat/completions", ENDLESS)
        response = {"model": "tiny", "input": "a", "stream": True, "max_output_tokens": 760}
        named, events = followed(url, "/v1/responses", {**response, "temperature": 1.9})
        end(running)
        chat.join(60)
        named.join(60)
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "draining"
    # The text may have ended by itself in the meantime.
    assert events[-2] in ("event: error", "event: response.completed", "event: response.incomplete")


def test_an_answer_in_one_piece_gets_503(folder: Path) -> None:
    replies: list[httpx.Response] = []
    body = {**ENDLESS, "stream": False}
    with process(folder) as (running, url):
        thread = threading.Thread(
            target=lambda: replies.append(
                httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)
            )
        )
        thread.start()
        time.sleep(0.5)
        end(running)
        thread.join(60)
    assert (replies[0].status_code, replies[0].json()["error"]["code"]) == (503, "draining")
    assert "retry-after" in replies[0].headers


def test_a_lesson_and_its_events_end(folder: Path) -> None:
    with process(folder) as (running, url):
        lesson = {"name": "late", "kind": "folder", "tokens": 2_000_000, "layers": "last:1"}
        assert httpx.post(f"{url}/v1/teach", json=lesson, timeout=60).status_code == 202
        events, lines = followed(url, "/v1/teach/events")
        trainers = children(running.pid)
        assert trainers
        end(running)
        events.join(60)
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[-2].removeprefix("data: "))["state"] == "stopped"
    assert not any(Path(f"/proc/{pid}").exists() for pid in trainers)


def test_half_open_connections_do_not_hold_it_up(folder: Path) -> None:
    with process(folder) as (running, url):
        address = ("127.0.0.1", int(url.rsplit(":", 1)[1]))
        halves = [b"", b"GET /hea", b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
                  b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"]  # fmt: skip
        held = [socket.create_connection(address) for _ in halves]
        for client, half in zip(held, halves, strict=True):
            client.sendall(half)
        time.sleep(0.2)
        end(running)
        for client in held:
            client.close()


def test_a_second_signal_ends_it_at_once(folder: Path) -> None:
    with process(folder, "--drain-seconds", "600") as (running, url):
        lesson = {"name": "later", "kind": "folder", "tokens": 2_000_000, "layers": "last:1"}
        assert httpx.post(f"{url}/v1/teach", json=lesson, timeout=60).status_code == 202
        followed(url, "/v1/teach/events")
        followed(url, "/v1/chat/completions", ENDLESS)
        trainers = children(running.pid)
        running.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        running.send_signal(signal.SIGTERM)
        signalled = time.monotonic()
        running.wait(SLACK)
        assert time.monotonic() - signalled < END_SECONDS
        time.sleep(0.5)
        output = running.communicate()[1]
    assert "Traceback" not in output, output
    assert not any(Path(f"/proc/{pid}").exists() for pid in trainers)


class Endless:
    """An application that never ends."""

    async def shutdown(self) -> None:
        await asyncio.Event().wait()


@pytest.mark.parametrize("signals_before", [2, 1])
def test_answers_end_before_uvicorn_would_cancel_them(
    signals_before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Since Python 3.12, Uvicorn waits for connections, and then cancels their answers."""
    monkeypatch.setattr(run, "FORCED_SECONDS", 0.05)
    app = create_app(None, Settings())
    steps: list[str] = []
    server = DrainingServer(http_config(app), app.state.service, app.state.teacher, lambda: 1 / 0)
    monkeypatch.setattr(server, "lifespan", Endless(), raising=False)
    monkeypatch.setattr(server.service.admission, "end", lambda: steps.append("answers"))
    monkeypatch.setattr(server.teacher, "kill", lambda: steps.append("lesson"))

    async def close(*_: object) -> None:
        steps.append("connections")
        for _signal in range(2 - signals_before):
            server.handle_exit(signal.SIGTERM, None)

    monkeypatch.setattr(uvicorn.Server, "shutdown", close)
    for _signal in range(signals_before):
        server.handle_exit(signal.SIGTERM, None)
    asyncio.run(asyncio.wait_for(server.shutdown(), SLACK))
    ended = ["answers", "lesson"]
    assert steps == [*(ended if signals_before == 2 else []), "connections", *ended]
