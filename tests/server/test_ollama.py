"""Ollama's own client against `/api`: documented features work, and a stream has the same content
as a whole reply.
"""

import json
from collections.abc import Iterator
from typing import Any

import ollama
import pytest
from live_server import CONTEXT, Live

import deepseek
from deepseek.server.encoding import encoded

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
    "no_content": {"messages": [{"role": "system"}, *ASKED]},
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
        {"prompt": "the value", "suffix": "", "template": "", "context": [], "images": []},
        {"prompt": "the value", "suffix": "of the model"},
        {"prompt": "the value", "options": {**OPTIONS, "f16_kv": True, "vocab_only": False}},
    ],
    ids=["chat", "raw", "system", "empty", "suffix", "older options"],
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


def test_a_suffix_is_that_of_completions(server: Live, api: ollama.Client) -> None:
    gap = api.generate(model="tiny", prompt="the value", suffix="the model", options=OPTIONS)
    with server.client() as openai:
        plain = openai.completions.create(
            model="tiny", prompt="the value", suffix="the model", temperature=0, max_tokens=12
        )
    assert gap.response == plain.choices[0].text


@pytest.mark.parametrize("raw", [False, True])
def test_log_probabilities_are_those_of_the_text(api: ollama.Client, raw: bool) -> None:
    request: dict[str, Any] = {
        "model": "tiny",
        "prompt": "the value",
        "raw": raw,
        "options": OPTIONS,
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = api.generate(**request)
    assert len(whole.logprobs or ()) == whole.eval_count
    for entry in whole.logprobs or ():
        assert entry.top_logprobs is not None
        assert 1 <= len(entry.top_logprobs) <= 2  # two tokens may have the same text
        assert entry.logprob == pytest.approx(max(top.logprob for top in entry.top_logprobs))
    streamed = [
        entry for line in api.generate(**request, stream=True) for entry in line.logprobs or ()
    ]
    assert streamed == whole.logprobs


def test_log_probabilities_of_a_chat(api: ollama.Client) -> None:
    request: dict[str, Any] = {"model": "tiny", "messages": ASKED, "options": OPTIONS}
    whole = api.chat(**request, logprobs=True)
    assert len(whole.logprobs or ()) == whole.eval_count
    assert api.chat(**request).logprobs is None


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


@pytest.mark.parametrize(
    ("arguments", "read"),
    [
        ({"digit": 1}, {"digit": 1}),
        ('{"digit": 1}', {"digit": 1}),
        (None, {}),
        ("", {"value": ""}),
        ("[1]", {"value": "[1]"}),
        ([1], {"value": [1]}),
        (1, {"value": 1}),
    ],
)
def test_arguments_of_a_call_are_an_object(
    server: Live, api: ollama.Client, arguments: Any, read: dict[str, Any]
) -> None:
    call = {"const": {"name": "pick", "arguments": arguments}}
    options = {"temperature": 0, "num_predict": 300, "frequency_penalty": 1.0}
    request: dict[str, Any] = {"model": "tiny", "messages": ASKED, "tools": [TOOL]}
    whole = api.chat(**request, format=call, options=options)
    streamed = list(api.chat(**request, format=call, options=options, stream=True))
    for message in (whole.message, streamed[-2].message):
        [written] = message.tool_calls or ()
        assert (written.function.name, written.function.arguments) == ("pick", read)
    with server.http() as http:
        body = {**request, "max_tokens": 300, "json_schema": call, "frequency_penalty": 1.0}
        reply = http.post("/v1/chat/completions", json=body).json()
    [openai_call] = reply["choices"][0]["message"]["tool_calls"]
    told = json.loads(openai_call["function"]["arguments"])
    assert told == (read if isinstance(told, dict) else arguments)


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "assistant", "content": "The value"}],
        [*ASKED, {"role": "assistant", "tool_calls": [{"function": {"name": "pick"}}]}],
    ],
    ids=["alone", "a call"],
)
def test_what_cannot_be_continued_gets_an_answer(server: Live, messages: list[Any]) -> None:
    body = {"model": "tiny", "messages": messages, "stream": False, "options": {"num_predict": 2}}
    with server.http() as http:
        reply = http.post("/api/chat", json=body)
    assert (reply.status_code, reply.json()["done_reason"]) == (200, "length")


def test_an_empty_prompt_loads_the_model(api: ollama.Client) -> None:
    assert api.generate(model="tiny", prompt="").done_reason == "load"
    assert api.chat(model="tiny", messages=[]).done_reason == "load"
    assert api.embed(model="tiny", input="").embeddings == []
    assert api.embed(model="tiny", input=[]).embeddings == []
    assert api.embeddings(model="tiny", prompt="").embedding == []
    with pytest.raises(ollama.ResponseError, match="nope"):
        api.embed(model="nope", input="")
    with pytest.raises(ollama.ResponseError, match="no model"):
        api.generate(model="other", prompt="")


def test_what_ollama_reads_as_random_or_off_is_read_so(api: ollama.Client) -> None:
    def written(**options: Any) -> str:
        dials = {"temperature": 1.5, "num_predict": 24, **options}
        return api.generate(model="tiny", prompt="the value", raw=True, options=dials).response

    assert written(seed=-1) != written(seed=-1)
    assert written(seed=3) == written(seed=3, top_k=-1) == written(seed=3, repeat_last_n=64)
    assert written(top_p=0) == written(temperature=0)
    penalised = {"seed": 3, "repeat_penalty": 3.0}
    assert written(**penalised) != written(seed=3)
    assert written(**penalised, repeat_last_n=0) == written(seed=3)


@pytest.mark.parametrize("end", ["\x85", "\u2028", "\u2029"])
def test_no_character_of_an_answer_ends_a_line_of_the_stream(end: str) -> None:
    assert encoded({"content": f"a{end}b"}).decode().splitlines() == [
        json.dumps({"content": f"a{end}b"}, separators=(",", ":"))
    ]


def test_models_are_listed_and_shown(api: ollama.Client) -> None:
    assert "tiny+one" in [model.model for model in api.list().models]
    assert "tiny" in [model.model for model in api.ps().models]
    # Ollama's own program shows the first twelve characters.
    assert {len(model.digest or "") for model in api.list().models} == {64}
    shown = api.show("tiny:latest")
    assert shown.capabilities == ["completion", "tools", "insert"]
    assert shown.modelinfo is not None
    assert shown.modelinfo["llama.block_count"] == 3


def test_embeddings_are_those_of_the_other_route(server: Live, api: ollama.Client) -> None:
    reply = api.embed(model="tiny", input=["the value", "a model"])
    with server.client() as openai:
        other = openai.embeddings.create(model="tiny", input=["the value", "a model"])
    for vector, item in zip(reply.embeddings, other.data, strict=True):
        assert list(vector) == pytest.approx(item.embedding, abs=1e-6)


@pytest.mark.parametrize("text", ["a model " * 1000, "the value\n" * 20_000])
def test_a_text_to_embed_is_cut_to_the_context_unless_that_is_refused(
    server: Live, api: ollama.Client, text: str
) -> None:
    reply = api.embed(model="tiny", input=["the value", text])
    ids = server.engine.tokenizer(text).input_ids[: CONTEXT - 1]
    assert list(reply.embeddings[1]) == pytest.approx(server.engine.embed(ids), abs=1e-6)
    with pytest.raises(ollama.ResponseError, match="too long"):
        api.embed(model="tiny", input=text, truncate=False)


def test_older_routes_and_names_work(server: Live, api: ollama.Client) -> None:
    older = api.embeddings(model="tiny", prompt="the value").embedding
    assert list(older) == pytest.approx(
        list(api.embed(model="tiny", input="the value").embeddings[0])
    )
    with server.http() as http:
        assert http.post("/api/show", json={"name": "tiny:latest"}).status_code == 200
        reply = http.post("/api/show", json={})
    assert (reply.status_code, reply.json()) == (
        400,
        {"error": "The field model is missing; send it."},
    )


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


STREAMS: dict[str, dict[str, Any]] = {
    "/api/chat": {"model": "tiny", "messages": ASKED},
    "/api/generate": {"model": "tiny", "prompt": "the expert"},
    "/v1/chat/completions": {"model": "tiny", "messages": ASKED},
    "/v1/completions": {"model": "tiny", "prompt": "the expert", "max_tokens": 4},
    "/v1/messages": {"model": "tiny", "messages": ASKED, "max_tokens": 4},
    "/v1/responses": {"model": "tiny", "input": "the expert", "max_output_tokens": 4},
    "/completion": {"prompt": "the expert", "n_predict": 4},
    "/infill": {"input_prefix": "the ", "input_suffix": " expert", "n_predict": 4},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", STREAMS)
def test_the_description_names_the_media_type(server: Live, route: str, stream: bool) -> None:
    with server.http() as http:
        operation = http.get("/openapi.json").json()["paths"][route]["post"]
        reply = http.post(route, json={**STREAMS[route], "stream": stream})
    assert reply.status_code == 200
    media_type = reply.headers["content-type"].partition(";")[0]
    assert media_type in operation["responses"]["200"]["content"]
