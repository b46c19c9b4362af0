"""All computing requests pass the same admission: one queue and one budget; they end when the
client disconnects or time is up, and never delay a running answer by more than one chunk.
"""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from live_server import CONTEXT, Live, live
from starlette.requests import Request as HttpRequest
from starlette.types import Message
from waiting import wait_for

from deepseek.engine.embedding import ActiveEmbedding
from deepseek.engine.engine import Engine
from deepseek.engine.request import Request
from deepseek.engine.sampler import Sampling
from deepseek.engine.scheduler import PREFILL_CHUNK
from deepseek.runner import Chunk
from deepseek.server import admission
from deepseek.server.admission import Admission, ComputingRoute
from deepseek.server.app import ROUTERS
from deepseek.server.encoding import encoded_aside
from deepseek.server.errors import ApiError
from deepseek.server.service import Service
from deepseek.server.settings import Settings
from deepseek.text.tokenizer import encode_plain

TEXT = "the router returns the value of the expert " * 60
LONG = {"max_tokens": 700, "logit_bias": {"0": -100, "2": -100}}
TURNS = [{"role": "user", "content": "a"}]
CHAT: dict[str, Any] = {"model": "tiny", "messages": TURNS}
NATIVE: dict[str, Any] = {"prompt": "a", "n_predict": 700, "ignore_eos": True}
OPTIONS = {"num_predict": 700}


@dataclass(frozen=True)
class Sent:
    """A request to a route."""

    path: str
    body: dict[str, Any]


COMPUTING = {
    "chat": Sent("/v1/chat/completions", {**CHAT, **LONG}),
    "completions": Sent("/v1/completions", {"model": "tiny", "prompt": "a", **LONG}),
    "suffix": Sent("/v1/completions", {"model": "tiny", "prompt": "a", "suffix": "b", **LONG}),
    "responses": Sent("/v1/responses", {"model": "tiny", "input": "a", "max_output_tokens": 700}),
    "embeddings": Sent("/v1/embeddings", {"model": "tiny", "input": [TEXT] * 200}),
    "anthropic": Sent("/v1/messages", {**CHAT, "max_tokens": 700}),
    "ollama chat": Sent("/api/chat", {**CHAT, "stream": False, "options": OPTIONS}),
    "ollama generate": Sent(
        "/api/generate", {"model": "tiny", "prompt": "a", "stream": False, "options": OPTIONS}
    ),
    "ollama raw": Sent(
        "/api/generate",
        {"model": "tiny", "prompt": "a", "raw": True, "stream": False, "options": OPTIONS},
    ),
    "ollama embed": Sent("/api/embed", {"model": "tiny", "input": [TEXT] * 200}),
    "llama.cpp": Sent("/completion", NATIVE),
    "infill": Sent("/infill", {**NATIVE, "n_predict": 600, "input_suffix": "b"}),
}
"""A long request for each computing route, and for each code path in it."""

PLANNED = {
    "count_tokens": Sent("/v1/messages/count_tokens", CHAT),
    "tokenize": Sent("/tokenize", {"messages": TURNS}),
    "template": Sent("/apply-template", {"messages": TURNS}),
    "detokenize": Sent("/detokenize", {"tokens": [5]}),
    "older ollama embed": Sent("/api/embeddings", {"model": "tiny", "prompt": "a"}),
}
"""A request for each route that only builds a prompt or its text; and for "/api/embeddings", which
computes one short text as "/api/embed" does several.
"""

STREAMED = {
    name: Sent(sent.path, {**sent.body, "stream": True})
    for name, sent in COMPUTING.items()
    if "embed" not in name
}

by_name = pytest.mark.parametrize("sent", COMPUTING.values(), ids=COMPUTING)
each_admitted = pytest.mark.parametrize(
    "sent", [*COMPUTING.values(), *PLANNED.values()], ids=[*COMPUTING, *PLANNED]
)


def without_ends(running: Live) -> None:
    """Let no answer end before its token limit."""
    vocabulary = running.engine._vocabulary
    vocabulary.opening([5])  # builds the constraints while the end tokens still exist
    vocabulary.ends = frozenset()


def check_error(sent: Sent, error: Any, status: int, code: str) -> None:
    """Check an error's body, in the layout of the path's API."""
    if sent.path.startswith("/v1/messages"):
        assert error["type"] == "error"
        kinds = {429: "rate_limit_error", 504: "timeout_error"}
        assert error["error"]["type"] == kinds[status]
        assert error["error"]["message"]
    elif sent.path.startswith("/api/"):
        assert error["error"] and isinstance(error["error"], str)
    else:
        assert error["error"]["code"] == code


def check_refusal(sent: Sent, reply: httpx.Response, status: int, code: str) -> None:
    """Check the refusal of a whole request; it says when to retry."""
    assert reply.status_code == status, reply.text
    assert int(reply.headers["retry-after"]) >= 1
    check_error(sent, reply.json(), status, code)


@pytest.fixture(scope="module")
def computing(served_folder: Path) -> Iterator[Live]:
    """A server with a batch of two requests and a queue of four, whose answers are long."""
    with live(served_folder, Settings(), max_running=2, max_waiting=4) as running:
        without_ends(running)
        yield running


@pytest.fixture(scope="module")
def hurried(served_folder: Path) -> Iterator[Live]:
    """A server with a short time limit, on which no answer ends earlier."""
    with live(served_folder, Settings(request_seconds=0.05)) as running:
        without_ends(running)
        yield running


def send_and_leave(server: Live, sent: Sent) -> socket.socket:
    """Send a request on a connection that the caller closes without reading."""
    content = json.dumps(sent.body).encode()
    client = socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])))
    client.sendall(
        f"POST {sent.path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n".encode()
        + content
    )
    return client


def test_every_route_that_is_admitted_is_tested_here() -> None:
    """Except `/api/show`, which describes the model and computes nothing."""
    routes = [route for module in ROUTERS for route in module.router.routes]
    admitted = {
        route.path
        for route in routes
        if isinstance(route, ComputingRoute) and "POST" in (route.methods or ())
    }
    tested = {sent.path for sent in (*COMPUTING.values(), *PLANNED.values())}
    assert admitted - tested == {"/api/show"} and tested <= admitted


@each_admitted
def test_a_full_queue_is_429_with_the_time_to_wait(
    computing: Live, sent: Sent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(computing.engine, "_max_waiting", 0)
    with computing.http() as http:
        refused = http.post(
            sent.path, content=b"no JSON", headers={"Content-Type": "application/json"}
        )
    check_refusal(sent, refused, 429, "queue_full")


MANY: dict[str, Callable[[int], Sent]] = {
    "chat": lambda count: Sent("/v1/chat/completions", {**CHAT, "max_tokens": 2, "n": count}),
    "completions": lambda count: Sent(
        "/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 2, "n": count}
    ),
    "prompts": lambda count: Sent(
        "/v1/completions", {"model": "tiny", "prompt": ["a"] * count, "max_tokens": 2}
    ),
}
"""Requests for several answers."""


@pytest.mark.parametrize("request_for", MANY.values(), ids=MANY)
def test_as_many_answers_as_run_and_wait_are_taken_on_an_idle_server(
    computing: Live, request_for: Callable[[int], Sent]
) -> None:
    """Regression: more than `max_waiting` were randomly refused with 429."""
    most = computing.engine.max_requests
    with computing.http() as http:
        for count in (computing.engine.max_requests - 1, most) * 5:
            wait_for(lambda: not computing.engine.stats().running)
            sent = request_for(count)
            reply = http.post(sent.path, json=sent.body)
            assert reply.status_code == 200, reply.text
            assert len(reply.json()["choices"]) == count
        sent = request_for(most + 1)
        refused = http.post(sent.path, json=sent.body)
    assert refused.status_code == 400
    assert f"at most {most} can run and wait here" in refused.json()["error"]["message"]


@by_name
def test_a_client_that_leaves_ends_its_computation(computing: Live, sent: Sent) -> None:
    before = computing.engine.stats().finished.get("cancelled", 0)
    with send_and_leave(computing, sent):
        wait_for(lambda: computing.engine.stats().running)
    wait_for(lambda: computing.engine.stats().finished.get("cancelled", 0) > before)
    wait_for(lambda: not computing.service.admission.jobs)
    wait_for(lambda: computing.engine.stats().reserved_bytes == 0)


@by_name
def test_a_computation_has_a_time_limit(hurried: Live, sent: Sent) -> None:
    with hurried.http() as http:
        check_refusal(sent, http.post(sent.path, json=sent.body), 504, "timeout")
    wait_for(lambda: hurried.engine.stats().reserved_bytes == 0)


@pytest.mark.parametrize("sent", STREAMED.values(), ids=STREAMED)
def test_a_stream_that_is_out_of_time_ends_with_an_error(hurried: Live, sent: Sent) -> None:
    """If a token came in time, the status has already been sent."""
    with hurried.http() as http:
        reply = http.post(sent.path, json=sent.body)
    wait_for(lambda: hurried.engine.stats().reserved_bytes == 0)
    if reply.status_code == 504:
        return
    assert reply.status_code == 200
    objects = [line.removeprefix("data: ") for line in reply.text.splitlines() if "{" in line]
    check_error(sent, json.loads(objects[-1]), 504, "timeout")


@each_admitted
def test_a_prompt_that_takes_too_long_is_given_up(
    computing: Live, sent: Sent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "PLAN_SECONDS", 0.2)

    def delayed(run: Callable[..., Any]) -> Callable[..., Any]:
        return lambda work, *abandon: run(lambda: time.sleep(0.6) or work(), *abandon)

    for name in ("run", "convert"):
        whole = getattr(computing.service.admission, name)
        monkeypatch.setattr(computing.service.admission, name, delayed(whole))
    with computing.http() as http:
        check_refusal(sent, http.post(sent.path, json=sent.body), 504, "timeout")
    wait_for(lambda: not computing.engine.stats().running)
    wait_for(lambda: not computing.engine.stats().reserved_bytes)
    assert computing.service.admission.planning == 0


@each_admitted
def test_prompts_in_the_making_are_counted(
    computing: Live, sent: Sent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(computing.service.admission, "planning", computing.engine.max_requests)
    with computing.http() as http:
        check_refusal(sent, http.post(sent.path, json=sent.body), 429, "queue_full")


def test_abandoned_embeddings_do_not_delay_a_chat(
    computing: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: seven of them made a chat wait for 25.5 s."""
    chunks: list[ActiveEmbedding] = []
    advance = ActiveEmbedding.advance
    monkeypatch.setattr(
        ActiveEmbedding, "advance", lambda one: bool(chunks.append(one) or advance(one))
    )
    for _ in range(7):
        with send_and_leave(computing, COMPUTING["embeddings"]):
            wait_for(lambda: computing.service.active)
    with computing.http() as http:
        assert http.post("/v1/chat/completions", json={**CHAT, "max_tokens": 2}).status_code == 200
    wait_for(lambda: not computing.engine.stats().running)
    assert len(chunks) < 7 * 200  # all texts of all requests would be at least nine times as many
    wait_for(lambda: not computing.service.active)


def test_embeddings_are_the_same_in_chunks_and_beside_a_chat(computing: Live) -> None:
    texts = [TEXT, "a", TEXT[:700]]
    with computing.http() as http:
        alone = [
            http.post("/v1/embeddings", json={"model": "tiny", "input": text}).json()["data"][0]
            for text in texts
        ]
        with send_and_leave(computing, COMPUTING["chat"]):
            reply = http.post("/v1/embeddings", json={"model": "tiny", "input": texts}).json()
    assert [one["embedding"] for one in reply["data"]] == [one["embedding"] for one in alone]
    assert [one["index"] for one in reply["data"]] == [0, 1, 2]


class Recorder:
    """Records the number of prompt and text tokens in each step of an engine, and its decoding
    rows.
    """

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
    """With any concurrent requests, each step has at most one chunk of their tokens."""
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
        wait_for(lambda: server.engine.stats().reserved_bytes == 0)
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


def test_conversions_do_not_delay_a_chat(computing: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversion may be of a whole body, and there are only two threads for prompts."""
    begun = threading.Semaphore(0)
    release = threading.Event()
    count = computing.service.counter.chat

    def slow(*args: Any, **options: Any) -> Any:
        begun.release()
        release.wait(60)
        return count(*args, **options)

    def ask(name: str) -> int:
        with computing.http() as http:
            return http.post(PLANNED[name].path, json=PLANNED[name].body).status_code

    monkeypatch.setattr(admission, "PLAN_SECONDS", 5)
    monkeypatch.setattr(computing.service.counter, "chat", slow)
    with ThreadPoolExecutor() as threads:
        converted = [threads.submit(ask, name) for name in ("count_tokens", "tokenize", "template")]
        try:
            assert begun.acquire(timeout=30)
            lane = computing.service.admission.converters
            wait_for(lambda: lane.requests == len(converted))
            assert computing.service.admission.planning == 0, "they take no chat's place"
            with computing.http() as http:
                chat = http.post("/v1/chat/completions", json={**CHAT, "max_tokens": 2})
        finally:
            release.set()
        assert chat.status_code == 200
        assert [one.result() for one in converted] == [200, 200, 200]


def test_a_slow_grammar_does_not_delay_other_requests(
    computing: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: five requests with such schemas made a plain one wait for 19.5 s."""
    begun = threading.Semaphore(0)
    release = threading.Event()
    check = computing.engine.check_grammar

    def slow(grammar: Any) -> None:
        begun.release()
        release.wait(60)
        check(grammar)

    def ask(body: dict[str, Any]) -> int:
        with computing.http() as http:
            return http.post(
                "/v1/chat/completions", json={**CHAT, "max_tokens": 2, **body}
            ).status_code

    forms: list[dict[str, Any]] = [
        {"response_format": {"type": "json_object"}},
        {"guided_regex": "a"},
        {"structured_outputs": {"choice": ["a"]}},
        {"grammar": 'root ::= "a"'},
        {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required"},
    ]
    monkeypatch.setattr(computing.engine, "check_grammar", slow)
    with ThreadPoolExecutor() as threads:
        constrained = [threads.submit(ask, form) for form in forms]
        try:
            assert begun.acquire(timeout=30)
            lane = computing.service.admission.constrained
            wait_for(lambda: lane.requests == len(forms))
            assert ask({}) == 200
            assert ask({"response_format": {"type": "text"}}) == 200
            assert not any(one.done() for one in constrained)
        finally:
            release.set()
        assert [one.result() for one in constrained] == [200] * len(forms)


@pytest.mark.parametrize("name", ["detokenize", "template"])
def test_the_event_loop_decodes_nothing(
    computing: Live, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    decode = computing.engine.tokenizer.decode

    def recorded(*args: Any, **options: Any) -> Any:
        threads.append(threading.current_thread().name)
        return decode(*args, **options)

    monkeypatch.setattr(computing.engine.tokenizer, "decode", recorded)
    with computing.http() as http:
        assert http.post(PLANNED[name].path, json=PLANNED[name].body).status_code == 200
    assert threads and all(thread.startswith("convert") for thread in threads)


def test_the_event_loop_checks_no_ids(computing: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request for embeddings can have a million ids."""
    threads: list[str] = []
    submit = computing.engine.submit_texts

    def recorded(texts: Any) -> Any:
        threads.append(threading.current_thread().name)
        return submit(texts)

    monkeypatch.setattr(computing.engine, "submit_texts", recorded)
    with computing.http() as http:
        reply = http.post("/v1/embeddings", json={"model": "tiny", "input": "a"})
    assert reply.status_code == 200
    assert len(threads) == 1 and threads[0].startswith("plan")


def test_changes_of_the_experts_do_not_delay_replies() -> None:
    """Changes wait for one another, which takes long with large packs or many replicas."""
    release = threading.Event()

    async def check() -> None:
        service = Service(Settings())
        service.fleet = Any
        changes = [
            asyncio.create_task(service.change(lambda _: release.wait(30))) for _ in range(40)
        ]
        await asyncio.sleep(0.01)
        try:
            assert await asyncio.wait_for(encoded_aside(dict), 5) == b"{}"
        finally:
            release.set()
        assert all(await asyncio.gather(*changes))
        service.close()

    asyncio.run(check())


def test_a_planned_result_whose_caller_left_is_given_back() -> None:
    """A thread cannot be stopped, but the requests that it submits are cancelled."""
    given_back: list[str] = []
    release = threading.Event()

    async def leave() -> None:
        rules = Admission()
        blocked = [asyncio.create_task(rules.run(release.wait)) for _ in range(admission.PLANNERS)]
        never = asyncio.create_task(rules.run(lambda: given_back.append("ran")))
        await asyncio.sleep(0.05)
        never.cancel()
        # Let the cancellation pass through the event loop before a thread becomes free.
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


def test_a_reply_that_is_there_as_its_time_is_up_is_sent() -> None:
    """Otherwise its job would never end."""

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def ask() -> str:
        async def work() -> str:
            # Runs after this coroutine has ended and before `unless_gone` continues.
            asyncio.get_running_loop().call_soon(asking.cancel)
            return "reply"

        request = HttpRequest({"type": "http"}, receive)
        asking = asyncio.create_task(admission.unless_gone(request, work()))
        return await asking

    assert asyncio.run(ask()) == "reply"


def test_a_slow_plan_does_not_stop_other_routes(
    computing: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(computing.service.writer, "text", lambda _: time.sleep(0.5) or [5])
    with httpx.Client(base_url=computing.url) as http:
        thread = threading.Thread(
            target=lambda: http.post(
                "/v1/completions", json={**COMPUTING["completions"].body, "max_tokens": 1}
            )
        )
        thread.start()
        wait_for(lambda: computing.service.admission.planning)
        with computing.http() as other:
            assert other.get("/v1/models").status_code == 200
            assert computing.service.admission.planning == 1
        thread.join()
