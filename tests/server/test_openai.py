"""The `openai` client against a real server: documented features work, and a stream has the same
content as a whole reply.
"""

import json
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from live_server import CONTEXT, Live
from openai import BadRequestError, OpenAI

from deepseek.engine.request import Request
from deepseek.engine.sampler import Sampling

ASKED: list[Any] = [{"role": "user", "content": "the expert of the model"}]
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "pick",
        "description": "Pick a digit.",
        "parameters": {
            "type": "object",
            "properties": {"digit": {"enum": [1, 2, 3]}},
            "required": ["digit"],
            "additionalProperties": False,
        },
    },
}
OTHER: dict[str, Any] = {"type": "function", "function": {"name": "stay"}}


@pytest.fixture(scope="module", autouse=True)
def plugged(server: Live) -> None:
    server.engine.plug(server.folder / "one.safetensors")
    server.engine.plug(server.folder / "two.safetensors")


def chat(client: OpenAI, **fields: Any) -> Any:
    given = {"model": "tiny", "messages": ASKED, "max_tokens": 12, "seed": 7, **fields}
    return client.chat.completions.create(**given)


def complete(client: OpenAI, **fields: Any) -> Any:
    given = {"model": "tiny", "prompt": "the value", "max_tokens": 12, "seed": 7, **fields}
    return client.completions.create(**given)


CHATS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "sampled": {},
    "cooler": {"temperature": 0.3},
    "hot": {"temperature": 2},
    "top_p": {"top_p": 0.4},
    "top_k": {"extra_body": {"top_k": 3}},
    "min_p": {"extra_body": {"min_p": 0.2}},
    "repetition": {"extra_body": {"repetition_penalty": 1.4}},
    "presence": {"presence_penalty": 1.5, "temperature": 0},
    "frequency": {"frequency_penalty": -1.5, "temperature": 0},
    "biased": {"logit_bias": {"40": 90}, "temperature": 0},
    "many": {"n": 4},
    "most": {"n": 16, "max_tokens": 2},
    "stop": {"stop": "e", "max_tokens": 60},
    "stops": {"stop": ["a", "the", "\n"], "max_tokens": 60},
    "logprobs": {"logprobs": True},
    "top_logprobs": {"logprobs": True, "top_logprobs": 5},
    "one_token": {"max_tokens": 1},
    "completion_limit": {"max_completion_tokens": 3},
    "no_experts": {"model": "tiny+none"},
    "expert": {"model": "tiny+one", "temperature": 0},
    "experts": {"model": "tiny+one+two"},
    "armed": {"extra_body": {"experts": {"arm": ["two"]}}},
    "denied": {"extra_body": {"experts": {"deny": ["one"]}}},
    "at_most_one": {"extra_body": {"experts": {"max_experts": 1}}},
    "system": {"messages": [{"role": "system", "content": "Be brief."}, *ASKED]},
    "developer": {"messages": [{"role": "developer", "content": "Be brief."}, *ASKED]},
    "parts": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": text} for text in "ab"]}]
    },
    "turns": {"messages": [*ASKED, {"role": "assistant", "content": "yes"}, *ASKED]},
    "refusal": {
        "messages": [
            *ASKED,
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
            *ASKED,
        ]
    },
    "cache": {"extra_body": {"prompt_cache_options": {"mode": "explicit", "ttl": "30m"}}},
    "unicode": {"messages": [{"role": "user", "content": "héé 模型 😀 <|im_end|>"}]},
    "user": {"user": "somebody", "metadata": {"run": "1"}},
    "json": {"response_format": {"type": "json_object"}, "max_tokens": 100},
    "text": {"response_format": {"type": "text"}},
    "schema": {
        "max_tokens": 200,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "s", "schema": TOOL["function"]["parameters"]},
        },
    },
    "tool": {"tools": [TOOL], "tool_choice": "required", "max_tokens": 200},
    "named_tool": {
        "tools": [TOOL, OTHER],
        "tool_choice": {"type": "function", "function": {"name": "pick"}},
        "max_tokens": 200,
    },
    "free_tool": {"tools": [TOOL, OTHER], "max_tokens": 40},
    "no_tool": {"tools": [TOOL], "tool_choice": "none"},
    "tool_turns": {
        "tools": [TOOL],
        "messages": [
            *ASKED,
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {
                        "id": "c1",
                        "type": "function",
                        "function": {"name": "pick", "arguments": '{"digit": 1}'},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "done"},
        ],
    },
}


def streamed_chat(client: OpenAI, fields: dict[str, Any]) -> tuple[list[dict[str, Any]], Any]:
    """Return the choices assembled from a streamed reply, and its usage."""
    choices: dict[int, dict[str, Any]] = {}
    usage = None
    for chunk in chat(client, stream=True, stream_options={"include_usage": True}, **fields):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            said = choices.setdefault(
                choice.index, {"content": "", "calls": [], "finish": None, "logprobs": []}
            )
            said["content"] += choice.delta.content or ""
            said["calls"] += [
                (c.function.name, c.function.arguments) for c in choice.delta.tool_calls or []
            ]
            said["finish"] = choice.finish_reason or said["finish"]
            said["logprobs"] += choice.logprobs.content if choice.logprobs else []
    return [choices[index] for index in sorted(choices)], usage


@pytest.mark.parametrize("name", CHATS)
def test_a_streamed_chat_says_what_a_whole_one_says(client: OpenAI, name: str) -> None:
    fields = CHATS[name]
    whole = chat(client, **fields)
    choices, usage = streamed_chat(client, fields)
    assert len(whole.choices) == fields.get("n", 1)
    for index, (choice, streamed) in enumerate(zip(whole.choices, choices, strict=True)):
        calls = [
            (call.function.name, call.function.arguments)
            for call in choice.message.tool_calls or []
        ]
        assert choice.index == index
        assert (choice.message.content or "") == streamed["content"]
        assert (calls, choice.finish_reason) == (streamed["calls"], streamed["finish"])
        assert (choice.logprobs.content if choice.logprobs else []) == streamed["logprobs"]
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (
        usage.prompt_tokens,
        usage.completion_tokens,
    )
    assert whole.usage.total_tokens == usage.total_tokens


COMPLETIONS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "sampled": {},
    "default_limit": {"max_tokens": None},
    "ids": {"prompt": [40, 41, 42]},
    "several": {"prompt": ["the", "value", "of"]},
    "several_ids": {"prompt": [[40, 41], [42]]},
    "several_twice": {"prompt": ["the", "value"], "n": 2},
    "empty": {"prompt": ""},
    "echo": {"echo": True},
    "echo_ids": {"prompt": [40, 41, 42], "echo": True},
    "echo_many": {"echo": True, "n": 3},
    "logprobs": {"logprobs": 3},
    "chosen_logprob": {"logprobs": 0},
    "scored": {"echo": True, "logprobs": 2, "max_tokens": 1},
    "only_scored": {"echo": True, "logprobs": 2, "max_tokens": 0},
    "nothing": {"max_tokens": 0},
    "stop": {"stop": ["e", "t"], "max_tokens": 60},
    "penalties": {"presence_penalty": 1, "frequency_penalty": 1},
    "biased": {"logit_bias": {"50": 100}, "temperature": 0},
    "expert": {"model": "tiny+two"},
    "denied": {"extra_body": {"experts": {"deny": ["one", "two"]}}},
}


@pytest.mark.parametrize("name", COMPLETIONS)
def test_a_streamed_completion_says_what_a_whole_one_says(client: OpenAI, name: str) -> None:
    fields = COMPLETIONS[name]
    whole = complete(client, **fields)
    texts: dict[int, str] = {}
    finish: dict[int, str] = {}
    columns: dict[int, dict[str, list[Any]]] = {}
    for chunk in complete(client, stream=True, **fields):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            finish[choice.index] = choice.finish_reason or finish.get(choice.index, "")
            if choice.logprobs:
                for column, values in choice.logprobs.to_dict().items():
                    columns.setdefault(choice.index, {}).setdefault(column, []).extend(values)
    for choice in whole.choices:
        assert (choice.text, choice.finish_reason) == (texts[choice.index], finish[choice.index])
        assert (choice.logprobs.to_dict() if choice.logprobs else None) == columns.get(choice.index)


def test_answers_are_the_engines(server: Live, client: OpenAI) -> None:
    ids = tuple(server.engine.tokenizer("the value").input_ids)
    events = list(server.engine.submit(Request(ids, Sampling(max_new_tokens=12))))
    assert complete(client, temperature=0).choices[0].text == "".join(
        event.text for event in events
    )


def test_scores_are_the_models(server: Live, client: OpenAI) -> None:
    """lm-eval's `local-completions` gets the log-likelihoods of the model itself."""
    import torch

    ids = server.engine.tokenizer("the expert returns the value").input_ids
    scored = (
        complete(client, model="tiny+none", prompt=[ids], echo=True, logprobs=1, max_tokens=1)
        .choices[0]
        .logprobs
    )
    with torch.inference_mode(), server.engine.model.experts.arming(None):
        expected = server.engine.model.log_probs(torch.tensor([ids]))[0]
    told = scored.token_logprobs[1:-1]
    assert scored.token_logprobs[0] is None
    assert len(told) == len(ids) - 1
    assert torch.allclose(torch.tensor(told), expected.float().flatten()[-len(told) :], atol=1e-3)
    assert all(
        max(top.values()) >= one - 1e-6
        for top, one in zip(scored.top_logprobs[1:-1], told, strict=True)
    )


@pytest.mark.parametrize("seed", range(5))
def test_a_seed_gives_the_same_text(client: OpenAI, seed: int) -> None:
    first, second = (chat(client, seed=seed, n=2) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in second.choices]
    assert texts[0] != texts[1]  # choices are sampled independently


@pytest.mark.parametrize("stop", ["e", "th", ["a", "o"], ["\n", " "]])
def test_a_stop_text_is_not_in_the_answer(client: OpenAI, stop: Any) -> None:
    answer = complete(client, max_tokens=200, stop=stop, seed=3).choices[0]
    assert not any(text in answer.text for text in ([stop] if isinstance(stop, str) else stop))
    assert answer.finish_reason == "stop"


def test_logprobs_add_up_to_the_text(client: OpenAI) -> None:
    choice = chat(client, logprobs=True, top_logprobs=3, temperature=0, max_tokens=20).choices[0]
    assert all(len(token.top_logprobs) == 3 for token in choice.logprobs.content)
    assert all(token.logprob == token.top_logprobs[0].logprob for token in choice.logprobs.content)
    assert sum(1 for _ in choice.logprobs.content) == 20


def test_offsets_count_text_that_is_held_back(client: OpenAI) -> None:
    letters = {"type": "regex", "pattern": "(ab){4}"}
    reply = complete(client, logprobs=0, stop=["ab!"], extra_body={"response_format": letters})
    logprobs = reply.choices[0].logprobs
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        assert reply.choices[0].text[offset:].startswith(token)


@pytest.mark.parametrize("model", ["tiny+one", "tiny+two"])
def test_the_reply_tells_which_experts_spoke(client: OpenAI, model: str) -> None:
    reply = chat(client, model=model, temperature=0)
    assert reply.experts == {model.removeprefix("tiny+"): reply.usage.completion_tokens}
    spoke = [
        choice.expert
        for chunk in chat(client, model=model, stream=True)
        for choice in chunk.choices
    ]
    assert model.removeprefix("tiny+") in spoke


@pytest.mark.parametrize(
    "fields", [{"model": "tiny+none"}, {"extra_body": {"experts": {"arm": []}}}]
)
def test_the_base_alone_has_a_name(server: Live, client: OpenAI, fields: dict[str, Any]) -> None:
    reply = chat(client, temperature=0, **fields)
    assert reply.experts == {}
    assert (
        reply.choices[0].message.content != chat(client, temperature=0).choices[0].message.content
    )


def test_models_are_the_sets_of_experts(client: OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert names == ["tiny", "tiny+none", "tiny+one", "tiny+two", "tiny+one+two"]
    assert [client.models.retrieve(name).id for name in names] == names


@pytest.mark.parametrize("seed", range(6))
def test_structured_output_follows_its_schema(client: OpenAI, seed: int) -> None:
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["a", "b"]}, "sure": {"type": "boolean"}},
        "required": ["kind", "sure"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": True}}
    choice = chat(client, seed=seed, response_format=form, max_tokens=300).choices[0]
    assert choice.finish_reason == "stop"
    jsonschema.validate(json.loads(choice.message.content), schema)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "pick"}}])
@pytest.mark.parametrize("seed", range(3))
def test_a_tool_that_must_be_called_is(client: OpenAI, choice: Any, seed: int) -> None:
    tools = [TOOL] if choice == "required" else [OTHER, TOOL]
    reply = chat(client, seed=seed, tools=tools, tool_choice=choice, max_tokens=300).choices[0]
    (call,) = reply.message.tool_calls
    assert (reply.finish_reason, call.function.name, reply.message.content) == (
        "tool_calls",
        "pick",
        None,
    )
    jsonschema.validate(json.loads(call.function.arguments), TOOL["function"]["parameters"])
    again = [{"role": "tool", "tool_call_id": call.id, "content": "3"}]
    assert chat(client, messages=[*ASKED, reply.message, *again], tools=tools).choices


def test_schemas_of_several_tools_keep_their_references(client: OpenAI) -> None:
    defined = {
        "$defs": {"D": {"enum": [4]}},
        "type": "object",
        "properties": {"d": {"$ref": "#/$defs/D"}},
        "required": ["d"],
        "additionalProperties": False,
    }
    tools = [
        {"type": "function", "function": {"name": name, "parameters": defined}}
        for name in ("x", "y")
    ]
    (call,) = (
        chat(client, tools=tools, tool_choice="required", max_tokens=500, seed=0)
        .choices[0]
        .message.tool_calls
    )
    assert json.loads(call.function.arguments) == {"d": 4}


RESPONSES: dict[str, dict[str, Any]] = {
    "text": {"input": "the expert"},
    "turns": {"input": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    "parts": {"input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}]},
    "instructions": {"input": "a", "instructions": "Be brief."},
    "schema": {
        "input": "a",
        "max_output_tokens": 300,
        "text": {
            "format": {"type": "json_schema", "name": "s", "schema": TOOL["function"]["parameters"]}
        },
    },
    "experts": {"input": "a", "model": "tiny+one"},
}


@pytest.mark.parametrize("name", RESPONSES)
def test_a_streamed_response_says_what_a_whole_one_says(client: OpenAI, name: str) -> None:
    fields: dict[str, Any] = {
        "model": "tiny",
        "max_output_tokens": 10,
        "temperature": 0,
        **RESPONSES[name],
    }
    whole = client.responses.create(**fields)
    events = list(client.responses.create(stream=True, **fields))
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    last = events[-1].response
    assert whole.output_text == deltas == last.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert whole.usage == last.usage
    assert whole.status == last.status == events[-1].type.removeprefix("response.")
    with client.responses.stream(**{**fields, "temperature": 0}) as stream:
        assert (
            stream.get_final_response().output_text == whole.output_text
            if whole.status == "completed"
            else True
        )


@pytest.mark.parametrize("given", ["the", ["the", "value"], [40, 41], [[40], [41, 42]]])
@pytest.mark.parametrize("form", ["float", "base64"])
def test_embeddings(server: Live, client: OpenAI, given: Any, form: Any) -> None:
    reply = client.embeddings.create(model="tiny", input=given, encoding_format=form)
    count = len(given) if isinstance(given, list) and not isinstance(given[0], int) else 1
    assert [one.index for one in reply.data] == list(range(count))
    # By default, the client asks for base64 and decodes it.
    same = client.embeddings.create(model="tiny", input=given)
    for one, other in zip(reply.data, same.data, strict=True):
        if form == "float":
            assert one.embedding == pytest.approx(other.embedding, abs=1e-6)
            assert sum(value**2 for value in one.embedding) == pytest.approx(1.0, abs=1e-4)


def test_embeddings_take_as_many_texts_as_openai_does(client: OpenAI) -> None:
    assert len(client.embeddings.create(model="tiny", input=["the"] * 300).data) == 300
    with pytest.raises(BadRequestError, match="of 2048 or fewer items"):
        client.embeddings.create(model="tiny", input=["the"] * 2049)
    with pytest.raises(BadRequestError, match="of 16 or fewer items"):
        client.completions.create(model="tiny", prompt=["the"] * 17)


BAD_CHATS: dict[str, tuple[dict[str, Any], int, str | None]] = {
    "unknown_field": ({"audio": {"voice": "x"}}, 400, "audio"),
    "unknown_nested": ({"stream_options": {"foo": 1}}, 400, "stream_options.foo"),
    "functions": ({"functions": []}, 400, "functions"),
    "too_many": ({"n": 17}, 400, "n"),
    "huge_n": ({"n": 10**9}, 400, "n"),
    "none": ({"n": 0}, 400, "n"),
    "text_for_number": ({"temperature": "1"}, 400, "temperature"),
    "cold": ({"temperature": -1}, 400, "temperature"),
    "boiling": ({"temperature": 2.5}, 400, "temperature"),
    "top_p": ({"top_p": -0.1}, 400, "top_p"),
    "top_logprobs": ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
    "top_alone": ({"top_logprobs": 2}, 400, "top_logprobs"),
    "no_tokens": ({"max_tokens": 0}, 400, "max_tokens"),
    "bias": ({"logit_bias": {"x": 1}}, 400, None),
    "bias_range": ({"logit_bias": {"1": 200}}, 400, "logit_bias.1"),
    "penalty": ({"presence_penalty": 3}, 400, "presence_penalty"),
    "seed": ({"seed": 1 << 70}, 400, "seed"),
    "empty_stop": ({"stop": ""}, 400, None),
    "role": ({"messages": [{"role": "king", "content": "x"}]}, 400, "messages.0.role"),
    "no_messages": ({"messages": []}, 400, "messages"),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        400,
        None,
    ),
    "model": ({"model": "gpt-9"}, 404, "model"),
    "unplugged": ({"model": "tiny+nobody"}, 404, "model"),
    "half_a_name": ({"model": "tiny+"}, 404, "model"),
    "named_twice": ({"model": "tiny+one", "experts": {"arm": ["two"]}}, 400, "experts.arm"),
    "unplugged_arm": ({"experts": {"arm": ["nobody"]}}, 404, "experts.arm"),
    "experts_field": ({"experts": {"force": True}}, 400, "experts.force"),
    "long": ({"messages": [{"role": "user", "content": "x " * CONTEXT}]}, 400, "messages"),
    "very_long": ({"messages": [{"role": "user", "content": "x" * 1_000_000}]}, 400, "messages"),
    "choice_without_tools": ({"tool_choice": "required"}, 400, "tool_choice"),
    "unknown_tool": (
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "z"}}},
        400,
        "tool_choice",
    ),
    "tool_type": ({"tools": [{"type": "retrieval"}]}, 400, None),
    "no_schema": (
        {"response_format": {"type": "json_schema"}},
        400,
        "response_format.json_schema.schema",
    ),
    "bad_schema": (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "s", "schema": {"type": "nonsense"}},
            }
        },
        400,
        None,
    ),
    "bool_for_int": ({"n": True}, 400, "n"),
    "surrogate": ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, None),
}


@pytest.mark.parametrize("name", BAD_CHATS)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_chat_is_refused_by_name(server: Live, name: str, stream: bool) -> None:
    fields, status, param = BAD_CHATS[name]
    body = {"model": "tiny", "messages": ASKED, "max_tokens": 4, "stream": stream, **fields}
    text = json.dumps(body)
    with server.http() as http:
        reply = http.post(
            "/v1/chat/completions", content=text, headers={"Content-Type": "application/json"}
        )
    error = reply.json()["error"]
    assert (
        (reply.status_code, error["param"]) == (status, param)
        if param
        else reply.status_code == status
    )
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].endswith(".")


BAD_COMPLETIONS: dict[str, tuple[dict[str, Any], int]] = {
    "no_prompt": ({"prompt": None}, 400),
    "empty_list": ({"prompt": []}, 400),
    "mixed": ({"prompt": ["a", 1]}, 400),
    "unknown_token": ({"prompt": [10**6]}, 400),
    "negative_token": ({"prompt": [-1]}, 400),
    "best_of": ({"best_of": 3}, 400),
    "too_many": ({"prompt": ["a"] * 9, "n": 2}, 400),
    "logprobs": ({"logprobs": 21}, 400),
    "full": ({"prompt": [40] * CONTEXT}, 400),
}


@pytest.mark.parametrize("name", BAD_COMPLETIONS)
def test_a_bad_completion_is_refused(server: Live, name: str) -> None:
    fields, status = BAD_COMPLETIONS[name]
    with server.http() as http:
        reply = http.post(
            "/v1/completions", json={"model": "tiny", "prompt": "a", "max_tokens": 4, **fields}
        )
    assert reply.status_code == status, reply.text
    assert reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", {"model": "tiny", "input": "a", "previous_response_id": "x"}),
        ("/v1/responses", {"model": "tiny", "input": "a", "tools": [{"type": "web_search"}]}),
        ("/v1/responses", {"model": "tiny", "input": "a", "background": True}),
        ("/v1/responses", {"model": "tiny", "input": []}),
        (
            "/v1/responses",
            {"model": "tiny", "input": "a", "text": {"format": {"type": "json_schema"}}},
        ),
        ("/v1/embeddings", {"model": "tiny", "input": []}),
        ("/v1/embeddings", {"model": "tiny+one", "input": "a"}),
        ("/v1/embeddings", {"model": "tiny", "input": "a", "dimensions": 1 << 16}),
        ("/v1/embeddings", {"model": "tiny", "input": "a " * CONTEXT}),
    ],
)
def test_other_routes_refuse_what_they_cannot_do(
    server: Live, path: str, body: dict[str, Any]
) -> None:
    with server.http() as http:
        reply = http.post(path, json=body)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '"x"', '{"model": NaN}', "[" * 50_000, "\xff", "{" * 9]
)
def test_a_malformed_body_is_refused(server: Live, content: str) -> None:
    with server.http() as http:
        reply = http.post(
            "/v1/chat/completions",
            content=content.encode("latin-1"),
            headers={"Content-Type": "application/json"},
        )
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nope", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/v1/models/x", 404),
    ],
)
def test_errors_have_one_form_everywhere(server: Live, method: str, path: str, status: int) -> None:
    with server.http() as http:
        reply = http.request(method, path)
    assert reply.status_code == status
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


def test_the_client_raises_its_own_errors(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="n is invalid"):
        chat(client, n=99)
    with pytest.raises(openai.NotFoundError, match="no model"):
        chat(client, model="x")


def test_unicode_arrives_whole(client: OpenAI) -> None:
    reply = complete(client, prompt="é模😀", echo=True, max_tokens=1)
    assert reply.choices[0].text.startswith("é模😀")


def test_curl_like_requests_need_no_client(server: Live) -> None:
    reply = httpx.post(
        f"{server.url}/v1/completions", json={"model": "tiny", "prompt": "a", "max_tokens": 2}
    )
    assert reply.json()["object"] == "text_completion"
