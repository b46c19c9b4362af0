"""Refusals are about the client's input, on every route, never about validators and classes."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from live_server import Live

CHAT = [{"role": "user", "content": "a"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "tiny",
        "messages": CHAT,
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "stop": ["x"],
        "experts": {"arm": ["one"]},
    },
    "/v1/completions": {"model": "tiny", "prompt": ["a"], "logit_bias": {"5": 1}, "stop": "x"},
    "/v1/responses": {
        "model": "tiny",
        "input": [{"type": "message", "role": "user", "content": "a"}],
        "text": {"format": {"type": "text"}},
    },
    "/v1/messages": {
        "model": "tiny",
        "max_tokens": 1,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
        "tools": [{"name": "f", "input_schema": {}}],
    },
    "/v1/messages/count_tokens": {"model": "tiny", "messages": CHAT},
    "/v1/embeddings": {"model": "tiny", "input": ["a"], "dimensions": 4},
    "/api/chat": {"model": "tiny", "messages": CHAT, "options": {"num_predict": 1}, "format": ""},
    "/api/generate": {"model": "tiny", "prompt": "a", "options": {"num_predict": 1}},
    "/api/embed": {"model": "tiny", "input": "a"},
    "/api/embeddings": {"model": "tiny", "prompt": "a"},
    "/api/show": {"model": "tiny"},
    "/completion": {"prompt": "a", "n_predict": 1, "stop": ["x"]},
    "/tokenize": {"messages": CHAT},
    "/detokenize": {"tokens": [5]},
    "/apply-template": {"messages": CHAT},
    "/v1/experts": {"name": "one"},
    "/v1/experts/arm": {"arm": ["one"]},
    "/v1/preferences": {"prompt": CHAT, "chosen": "a", "rejected": "b"},
}
VALIDATORS = re.compile(
    r"Input |input type|String should|union|discriminator|[Ll]iteral|valid (string|list|dict|integer|bool)"
    r"|pydantic|validat|instance of|[a-z][A-Z]|function-|constrained|tagged"
)
PARTS = [("image_url", "images"), ("input_audio", "sounds"), ("file", "documents|files")]
PATHS = ["/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"]


def message_of(server: Live, path: str, body: Any) -> str:
    """Return the message of a refusal, "" if there is none."""
    with server.http() as http:
        reply = http.post(path, json=body)
    assert reply.status_code < 500, reply.text
    if reply.status_code < 400:
        return ""
    error = reply.json()["error"]
    return str(error if isinstance(error, str) else error["message"])


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all values in a JSON value."""
    pairs = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [path, *(place for key, part in pairs for place in places(part, (*path, key)))]


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """Return a JSON value with one of its values replaced."""
    if not path:
        return new
    if isinstance(value, dict):
        return {**value, path[0]: replaced(value[path[0]], path[1:], new)}
    return [replaced(p, path[1:], new) if i == path[0] else p for i, p in enumerate(value)]


@given(data=st.data())
def test_no_refusal_speaks_of_validators(server: Live, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(BODIES)))
    body = BODIES[path]
    wrong = data.draw(
        st.sampled_from(
            [None, True, -1, 1.5, "", "x" * 600, [], {}, [[]], [5], {"type": "x"}, {"type": []}]
        )
    )
    place = data.draw(st.sampled_from(places(body)))
    message = message_of(server, path, replaced(body, place, wrong))
    assert not VALIDATORS.search(message.replace("x" * 20, "")), message
    assert message == "" or message.endswith((".", "..."))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("kind", "words"), PARTS)
def test_images_are_called_images(server: Live, path: str, kind: str, words: str) -> None:
    part = {"type": kind, kind: {"url": "data:,"}}
    turn = [{"role": "user", "content": [{"type": "text", "text": "a"}, part]}]
    field = "input" if path.endswith("responses") else "messages"
    message = message_of(server, path, {"model": "tiny", "max_tokens": 1, field: turn})
    if path.endswith("responses"):
        message = message_of(server, path, {"model": "tiny", "input": turn})
    assert re.search(f"({words}) are not supported", message), message


def test_images_of_ollama(server: Live) -> None:
    body = {"model": "tiny", "messages": [{**CHAT[0], "images": ["aGk="]}]}
    assert "images are not supported" in message_of(server, "/api/chat", body)
    body = {"model": "tiny", "prompt": "a", "images": ["aGk="]}
    assert "images" in message_of(server, "/api/generate", body)
