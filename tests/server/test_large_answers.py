"""A large answer does not block the event loop, so that `/health` and running streams continue."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from live_server import CONTEXT, Live, live, save_model
from transformers import AutoConfig

from deepseek.server import encoding
from deepseek.server.encoding import encoded, encoded_aside, is_large, parts
from deepseek.server.stream import Reply, joined

PROMPT_TOKENS = 3000
STALL_SECONDS = 0.03
"""Maximum processor time of the event loop between two turns of a sleeping task; 8 ms were
measured, and 60 ms when the same answer was built and encoded in one go.
"""

HEALTH_SECONDS = 1.0
"""Maximum time of `/health` meanwhile, on a machine with other work."""

ECHO: dict[str, Any] = {
    "model": "tiny",
    "prompt": [5 + place % 200 for place in range(PROMPT_TOKENS)],
    "max_tokens": 4,
    "logit_bias": {"0": -100, "2": -100},  # no end token before the token limit
    "echo": True,
    "logprobs": 20,
}

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=9) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=40,
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server whose model has a long context."""
    folder = tmp_path_factory.mktemp("large")
    base = save_model(folder / "tiny")
    config = AutoConfig.from_pretrained(base)
    config.max_position_embeddings = PROMPT_TOKENS + CONTEXT
    config.save_pretrained(base)
    with live(folder) as running:
        yield running


@pytest.fixture
def stalls(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The event loop's processor time between turns of a task that runs during each reply."""
    found: list[float] = []
    call = Reply.__call__

    async def beat() -> None:
        while True:
            started = time.thread_time()
            await asyncio.sleep(0.001)
            found.append(time.thread_time() - started)

    async def watched(reply: Reply, *args: Any) -> None:
        beating = asyncio.create_task(beat())
        try:
            await call(reply, *args)
        finally:
            beating.cancel()

    monkeypatch.setattr(Reply, "__call__", watched)
    return found


def whole(reply: httpx.Response) -> list[dict[str, Any]]:
    """Return the chunks of a reply; a reply that is not streamed is one chunk."""
    lines = reply.text.splitlines()
    if len(lines) == 1:
        return [reply.json()]
    data = [line.removeprefix("data: ") for line in lines if line]
    return [json.loads(line) for line in data if line != "[DONE]"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_large_echo_with_logprobs_leaves_the_loop_free(
    server: Live, stream: bool, stalls: list[float]
) -> None:
    replies: list[httpx.Response] = []

    def ask() -> None:
        with server.http() as http:
            replies.append(http.post("/v1/completions", json={**ECHO, "stream": stream}))

    thread = threading.Thread(target=ask)
    thread.start()
    waits: list[float] = []
    with server.http() as http:
        while thread.is_alive():
            started = time.perf_counter()
            assert http.get("/health").status_code == 200
            waits.append(time.perf_counter() - started)
            time.sleep(0.005)
    choices = [chunk["choices"][0] for chunk in whole(replies[0])]
    columns = joined([choice["logprobs"] for choice in choices])
    assert {len(column) for column in columns.values()} == {PROMPT_TOKENS + 4}
    text = "".join(choice["text"] for choice in choices)
    assert text.startswith(server.engine.tokenizer.decode(ECHO["prompt"]))
    placed = zip(columns["tokens"][:PROMPT_TOKENS], columns["text_offset"], strict=False)
    assert all(text.startswith(token, place) for token, place in placed if "\ufffd" not in token)
    assert columns["text_offset"] == sorted(columns["text_offset"])
    assert len(stalls) > 10 and len(waits) > 10
    assert max(stalls) < STALL_SECONDS
    assert max(waits) < HEALTH_SECONDS


def test_a_thread_encodes_the_same() -> None:
    value = {"a": [{"b": "\udc80"}, list(range(3000))]}
    assert asyncio.run(encoded_aside(lambda: value)) == encoded(value)


@settings(max_examples=40)
@given(value=JSON_VALUES, size=st.integers(1, 4))
def test_parts_add_up_and_are_small(value: Any, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "PART", size)
        found = list(parts(value))
        assert "".join(found).encode(errors="replace") == encoded(value)
        for part in found:
            if part[0] in "[{" and part[-1] in "]}" and len(part) > 1:
                assert len(json.loads(part)) <= size


@given(value=JSON_VALUES)
def test_large_means_more_values_than_one_part(value: Any) -> None:
    def count(inner: Any) -> int:
        below = inner.values() if isinstance(inner, dict) else inner
        return 1 + sum(map(count, below if isinstance(inner, dict | list) else ()))

    with pytest.MonkeyPatch.context() as patch:
        for size in (1, 5, 20):
            patch.setattr(encoding, "PART", size)
            assert is_large(value) == (count(value) > size)


@given(
    texts=st.lists(st.text(max_size=5), min_size=1),
    numbers=st.lists(st.none() | st.lists(st.integers(), max_size=3), min_size=1),
)
def test_pieces_are_joined_as_they_come(texts: list[str], numbers: list[Any]) -> None:
    pieces = [{"text": text, "last": place} for place, text in enumerate(texts)]
    assert joined(pieces) == {"text": "".join(texts), "last": len(texts) - 1}
    flat = [number for some in numbers if some is not None for number in some]
    assert joined(numbers) == (None if all(some is None for some in numbers) else flat)
    assert joined([{"a": None}, {"b": [1]}, {"b": [2], "a": "x"}]) == {"a": "x", "b": [1, 2]}
