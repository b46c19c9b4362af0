"""Ollama's own client against `/api`: what is documented works, and a stream says what a whole
reply says.
"""

import json
from collections.abc import Iterator
from typing import Any

import ollama
import pytest
from live_server import Live

import deepseek

ASKED: list[Any] = [{"role": "user", "content": "the expert of the model"}]
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "pick",
        "description": "Pick a digit.",
        "parameters": {"type": "object", "properties": {"digit": {"type": "integer"}}},
    },
}
OPTIONS = {"temperature": 0, "num_predict": 12}


@pytest.fixture(scope="module")
def api(server: Live) -> Iterator[ollama.Client]:
    server.engine.plug(server.folder / "one.safetensors")
    with ollama.Client(host=server.url) as client:
        yield client


CHATS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tagged": {"model": "tiny:latest"},
    "expert": {"model": "tiny+one"},
    "options": {
        "options": {
            **OPTIONS,
            "top_k": 5,
            "top_p": 0.9,
            "min_p": 0.1,
            "seed": 3,
            "repeat_penalty": 1.1,
            "num_ctx": 4096,
            "stop": ["zz"],
        }
    },
    "keep_alive": {"keep_alive": "5m"},
    "no_thinking": {"think": False},
    "json": {"format": "json", "options": {"temperature": 0, "num_predict": 40}},
    "tools": {"tools": [TOOL]},
    "system": {"messages": [{"role": "system", "content": "Be brief."}, *ASKED]},
    "prefilled": {"messages": [*ASKED, {"role": "assistant", "content": "The value"}]},
    "called": {
        "messages": [
            *ASKED,
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"function": {"name": "pick", "arguments": {"digit": 1}}}],
            },
            {"role": "tool", "tool_name": "pick", "content": "done"},
        ]
    },
}


@pytest.mark.parametrize("fields", CHATS.values(), ids=CHATS)
def test_chat_streams_what_the_whole_reply_says(api: ollama.Client, fields: dict[str, Any]) -> None:
    request = {"model": "tiny", "messages": ASKED, "options": OPTIONS, **fields}
    whole = api.chat(**request, stream=False)
    lines = list(api.chat(**request, stream=True))
    assert [line.done for line in lines] == [False] * (len(lines) - 1) + [True]
    assert "".join(line.message.content or "" for line in lines) == whole.message.content
    assert lines[-1].eval_count == whole.eval_count
    assert whole.done_reason in ("stop", "length")
    assert (whole.prompt_eval_count or 0) > 0
    durations = (whole.prompt_eval_duration or 0, whole.eval_duration or 0)
    assert min(durations) > 0
    assert (whole.total_duration or 0) >= sum(durations)


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "the value"},
        {"prompt": "the value", "raw": True},
        {"prompt": "the value", "system": "Be brief."},
        {"prompt": "the value", "suffix": "", "template": "", "context": []},
    ],
    ids=["chat", "raw", "system", "empty"],
)
def test_generate_streams_what_the_whole_reply_says(
    api: ollama.Client, fields: dict[str, Any]
) -> None:
    request = {"model": "tiny", "options": OPTIONS, **fields}
    whole = api.generate(**request, stream=False)
    lines = list(api.generate(**request, stream=True))
    assert "".join(line.response for line in lines) == whole.response
    assert whole.done


def test_raw_is_a_plain_completion(server: Live, api: ollama.Client) -> None:
    raw = api.generate(model="tiny", prompt="the value", raw=True, options=OPTIONS)
    with server.client() as openai:
        plain = openai.completions.create(
            model="tiny", prompt="the value", temperature=0, max_tokens=12
        )
    assert raw.response == plain.choices[0].text


def test_a_schema_constrains_the_answer(api: ollama.Client) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    options = {"temperature": 0, "num_predict": 300}
    reply = api.chat(model="tiny", messages=ASKED, format=schema, options=options)
    assert json.loads(reply.message.content or "") in ({"ok": True}, {"ok": False})


def test_an_empty_prompt_loads_the_model(api: ollama.Client) -> None:
    assert api.generate(model="tiny", prompt="").done_reason == "load"
    assert api.chat(model="tiny", messages=[]).done_reason == "load"


def test_models_are_listed_and_shown(api: ollama.Client) -> None:
    assert "tiny+one" in [model.model for model in api.list().models]
    assert "tiny" in [model.model for model in api.ps().models]
    shown = api.show("tiny:latest")
    assert shown.capabilities == ["completion", "tools"]
    assert shown.modelinfo is not None
    assert shown.modelinfo["llama.block_count"] == 3


def test_embeddings_are_those_of_the_other_route(server: Live, api: ollama.Client) -> None:
    reply = api.embed(model="tiny", input=["the value", "a model"])
    with server.client() as openai:
        other = openai.embeddings.create(model="tiny", input=["the value", "a model"])
    for vector, item in zip(reply.embeddings, other.data, strict=True):
        assert list(vector) == pytest.approx(item.embedding, abs=1e-6)


def test_the_version_is_ours(server: Live) -> None:
    with server.http() as http:
        assert http.get("/api/version").json() == {"version": deepseek.__version__}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model": "other"}, "no model"),
        ({"options": {"mirostat": 2}}, "mirostat"),
        ({"options": {"temperature": 9}}, "temperature"),
        ({"messages": [{"role": "user", "content": "a", "images": ["aGk="]}]}, "images are not"),
        ({"think": True}, "think"),
    ],
    ids=["model", "mirostat", "temperature", "image", "think"],
)
def test_errors_have_the_layout_of_this_api(
    server: Live, fields: dict[str, Any], words: str
) -> None:
    body = {"model": "tiny", "messages": ASKED, **fields}
    with server.http() as http:
        reply = http.post("/api/chat", json=body)
    assert reply.status_code in (400, 404)
    assert words in reply.json()["error"]


def test_a_body_needs_no_header(server: Live) -> None:
    body = (
        '{"model": "tiny", "prompt": "the value", "stream": false, "options": {"num_predict": 2}}'
    )
    with server.http() as http:
        assert http.post("/api/generate", content=body).json()["done"]
