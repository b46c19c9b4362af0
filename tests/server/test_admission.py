"""Every request that computes passes one admission: it waits in one queue, has one budget, ends
when its client leaves or its time is up, and never delays a running answer by more than one chunk.
"""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute
from hypothesis import given, settings
from hypothesis import strategies as st
from live_server import CONTEXT, Live, live

from deepseek.engine.embedding import ActiveEmbedding
from deepseek.engine.engine import Engine
from deepseek.engine.request import Request
from deepseek.engine.sampler import Sampling
from deepseek.engine.scheduler import PREFILL_CHUNK
from deepseek.runner import Chunk
from deepseek.server import admission
from deepseek.server.admission import Admission, ComputingRoute
from deepseek.server.app import ROUTERS
from deepseek.server.errors import ApiError
from deepseek.server.service import Settings
from deepseek.text.tokenizer import encode_plain

LONG = {"max_tokens": 700, "logit_bias": {"0": -100, "2": -100}}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "a"}]}
TEXT = "the router returns the value of the expert " * 60
COMPUTING: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {**CHAT, **LONG},
    "/v1/completions": {"model": "tiny", "prompt": "a", **LONG},
    "/v1/responses": {"model": "tiny", "input": "a", "max_output_tokens": 700, "temperature": 1.9},
    "/v1/embeddings": {"model": "tiny", "input": [TEXT] * 200},
}
"""A long request for each route that computes."""


@pytest.fixture(scope="module")
def computing(served_folder: Path) -> Iterator[Live]:
    """A server with room for two requests and a queue of four."""
    with live(served_folder, Settings(), max_running=2, max_waiting=4) as running:
        yield running


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def send_and_leave(server: Live, path: str, body: dict[str, Any]) -> socket.socket:
    """Send a request on a connection that the caller closes without reading."""
    content = json.dumps(body).encode()
    client = socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
    client.sendall(
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n".encode()
        + content
    )
    return client


def test_every_route_that_starts_a_job_is_admitted() -> None:
    routes = [route for module in ROUTERS for route in module.router.routes]
    admitted = {
        route.path
        for route in routes
        if isinstance(route, APIRoute) and isinstance(route, ComputingRoute)
    }
    assert admitted >= set(COMPUTING)


@pytest.mark.parametrize("path", COMPUTING)
def test_a_full_queue_is_429_with_the_time_to_wait(
    computing: Live, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(computing.engine, "_max_waiting", 0)
    with computing.http() as http:
        refused = http.post(path, content=b"no JSON", headers={"Content-Type": "application/json"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
    assert int(refused.headers["retry-after"]) >= 1


@pytest.mark.parametrize("path", COMPUTING)
def test_a_client_that_leaves_ends_its_computation(computing: Live, path: str) -> None:
    before = computing.engine.stats().finished.get("cancelled", 0)
    with send_and_leave(computing, path, COMPUTING[path]):
        wait_for(lambda: computing.engine.stats().running)
    wait_for(lambda: computing.engine.stats().finished.get("cancelled", 0) > before)
    wait_for(lambda: not computing.service.admission.jobs)
    assert computing.engine.stats().reserved_bytes == 0


@pytest.mark.parametrize("path", COMPUTING)
def test_a_computation_has_a_time_limit(served_folder: Path, path: str) -> None:
    with live(served_folder, Settings(request_seconds=0.05)) as server, server.http() as http:
        reply = http.post(path, json=COMPUTING[path])
        assert (reply.status_code, reply.json()["error"]["code"]) == (504, "timeout")
        assert int(reply.headers["retry-after"]) >= 1
        wait_for(lambda: server.engine.stats().reserved_bytes == 0)


@pytest.mark.parametrize("path", COMPUTING)
def test_a_prompt_that_takes_too_long_is_given_up(
    computing: Live, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "PLAN_SECONDS", 0.2)
    writer = computing.service.writer
    for name in ("text", "chat"):
        monkeypatch.setattr(writer, name, lambda *_: time.sleep(0.6) or [5])
    with computing.http() as http:
        reply = http.post(path, json=COMPUTING[path])
    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "timeout")
    wait_for(lambda: not computing.engine.stats().running)
    assert computing.service.admission.planning == 0


@pytest.mark.parametrize("path", COMPUTING)
def test_prompts_in_the_making_are_counted(
    computing: Live, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(computing.service.admission, "planning", computing.engine.max_requests)
    with computing.http() as http:
        assert http.post(path, json=COMPUTING[path]).status_code == 429


def test_abandoned_embeddings_do_not_delay_a_chat(
    computing: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven of them once made a chat wait for 25.5 s."""
    chunks: list[ActiveEmbedding] = []
    advance = ActiveEmbedding.advance
    monkeypatch.setattr(
        ActiveEmbedding, "advance", lambda one: bool(chunks.append(one) or advance(one))
    )
    for _ in range(7):
        with send_and_leave(computing, "/v1/embeddings", COMPUTING["/v1/embeddings"]):
            wait_for(lambda: computing.service.active)
    with computing.http() as http:
        assert http.post("/v1/chat/completions", json={**CHAT, "max_tokens": 2}).status_code == 200
    wait_for(lambda: not computing.engine.stats().running)
    assert len(chunks) < 7 * 200  # all texts of all of them are at least nine times as many
    wait_for(lambda: not computing.service.active)


def test_embeddings_are_the_same_in_chunks_and_beside_a_chat(computing: Live) -> None:
    texts = [TEXT, "a", TEXT[:700]]
    with computing.http() as http:
        alone = [
            http.post("/v1/embeddings", json={"model": "tiny", "input": text}).json()["data"][0]
            for text in texts
        ]
        with send_and_leave(computing, "/v1/chat/completions", {**CHAT, **LONG}):
            reply = http.post("/v1/embeddings", json={"model": "tiny", "input": texts}).json()
    assert [one["embedding"] for one in reply["data"]] == [one["embedding"] for one in alone]
    assert [one["index"] for one in reply["data"]] == [0, 1, 2]


class Recorder:
    """The number of prompt and text tokens in each step of an engine, and its decoding rows."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[tuple[int, int]] = []
        self.embedded = 0
        forward, advance = engine.runner.forward, ActiveEmbedding.advance

        def record(chunks: list[Chunk]) -> Any:
            sizes = [len(chunk.ids) for chunk in chunks]
            prompt = sum(size for size in sizes if size > 1)
            self.steps.append((prompt + self.embedded, sizes.count(1)))
            self.embedded = 0
            return forward(chunks)

        def count(embedding: ActiveEmbedding) -> bool:
            self.embedded += embedding.next_size
            return advance(embedding)

        monkeypatch.setattr(engine.runner, "forward", record)
        monkeypatch.setattr(ActiveEmbedding, "advance", count)


@settings(max_examples=8)
@given(
    prompts=st.lists(st.integers(1, CONTEXT - 20), max_size=4),
    texts=st.lists(st.lists(st.integers(1, CONTEXT), min_size=1, max_size=3), max_size=3),
)
def test_a_running_answer_waits_for_one_chunk_at_most(
    served_folder: Path, prompts: list[int], texts: list[list[int]]
) -> None:
    """Whatever is sent beside it, each step has at most one chunk of others' tokens."""
    with live(served_folder) as server, pytest.MonkeyPatch.context() as patch:
        recorder = Recorder(server.engine, patch)
        chat = server.engine.submit(Request((5,), Sampling(max_new_tokens=60), ignore_end=True))
        next(iter(chat))
        others = [
            server.engine.submit(Request((7,) * size, Sampling(max_new_tokens=1)))
            for size in prompts
        ]
        embeddings = [server.engine.submit_texts([[9] * size for size in sizes]) for sizes in texts]
        for generation in (chat, *others):
            assert list(generation)[-1].finish_reason in ("length", "stop")
        for embedding in embeddings:
            assert len(embedding.result.result(60)) == len(embedding.texts)
        assert server.engine.stats().reserved_bytes == 0
    assert max(tokens for tokens, _ in recorder.steps) <= PREFILL_CHUNK


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/embeddings"])
def test_a_text_beyond_the_context_is_refused_before_all_of_it_is_encoded(
    computing: Live, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []

    def counted(tokenizer: Any, texts: list[str]) -> Any:
        encoded.append(sum(map(len, texts)))
        return encode_plain(tokenizer, texts)

    monkeypatch.setattr("deepseek.server.prompt.encode_plain", counted)
    monkeypatch.setattr(computing.service.writer, "longest_text", 1 << 30)
    field = "input" if path.endswith("embeddings") else "prompt"
    with computing.http() as http:
        reply = http.post(path, json={"model": "tiny", field: TEXT * 500})
    assert reply.json()["error"]["code"] == "context_length_exceeded"
    assert 0 < sum(encoded) < len(TEXT) * 500 / 4


@given(st.integers(1, 6000), st.sampled_from("a 1\n\u20ac"))
def test_no_prompt_that_fits_is_refused_early(computing: Live, size: int, character: str) -> None:
    writer = computing.service.writer
    text = character * size
    fits = len(writer.tokenizer(text).input_ids) < writer.context
    try:
        writer.text(text)
    except ApiError:
        assert not fits
    else:
        assert fits


def test_a_planned_result_whose_caller_left_is_given_back() -> None:
    """A thread cannot be stopped, but what it submits is cancelled."""
    given_back: list[str] = []
    release = threading.Event()

    async def leave() -> None:
        rules = Admission()
        blocked = [asyncio.create_task(rules.run(release.wait)) for _ in range(admission.PLANNERS)]
        never = asyncio.create_task(rules.run(lambda: given_back.append("ran")))
        await asyncio.sleep(0.05)
        never.cancel()
        # The cancellation passes through the event loop; only then may a thread become free.
        await asyncio.wait([never])
        release.set()
        await asyncio.gather(*blocked)
        release.clear()
        running = asyncio.create_task(
            rules.run(lambda: release.wait() and "result", given_back.append)
        )
        await asyncio.sleep(0.05)
        running.cancel()
        release.set()
        while not given_back:
            await asyncio.sleep(0.01)
        rules.close()

    asyncio.run(leave())
    assert given_back == ["result"]


def test_a_slow_plan_does_not_stop_other_routes(
    computing: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(computing.service.writer, "text", lambda _: time.sleep(0.5) or [5])
    with httpx.Client(base_url=computing.url) as http:
        thread = threading.Thread(
            target=lambda: http.post(
                "/v1/completions", json={**COMPUTING["/v1/completions"], "max_tokens": 1}
            )
        )
        thread.start()
        wait_for(lambda: computing.service.admission.planning)
        with computing.http() as other:
            assert other.get("/v1/models").status_code == 200
            assert computing.service.admission.planning == 1
        thread.join()
