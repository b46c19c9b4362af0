"""`/v1/responses` through OpenAI's client: tools, items, and the cases that the Open Responses
project publishes.
"""

import json
from typing import Any

import openai
import pytest
from live_server import Live
from openai import OpenAI
from transformers import GenerationConfig

from deepseek.engine.request import Request

FUNCTION: dict[str, Any] = {
    "type": "function",
    "name": "get_weather",
    "description": "Get the current weather for a location",
    "parameters": {
        "type": "object",
        "properties": {"location": {"enum": ["here", "there"]}},
        "required": ["location"],
        "additionalProperties": False,
    },
}
REQUIRED = {
    "background",
    "completed_at",
    "created_at",
    "error",
    "frequency_penalty",
    "id",
    "incomplete_details",
    "instructions",
    "max_output_tokens",
    "max_tool_calls",
    "metadata",
    "model",
    "object",
    "output",
    "parallel_tool_calls",
    "presence_penalty",
    "previous_response_id",
    "prompt_cache_key",
    "reasoning",
    "safety_identifier",
    "service_tier",
    "status",
    "store",
    "temperature",
    "text",
    "tool_choice",
    "tools",
    "top_logprobs",
    "top_p",
    "truncation",
    "usage",
    "user",
}
"""Fields that the Open Responses specification requires in a response."""


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"type": "message", "role": role, "content": content}


BREAKPOINT = {"prompt_cache_breakpoint": {"mode": "explicit"}}

CASES: dict[str, dict[str, Any]] = {
    "basic": {"input": [turn("user", "Say hello in exactly 3 words.")]},
    "system": {"input": [turn("system", "You are a pirate."), turn("user", "Say hello.")]},
    "turns": {
        "input": [
            turn("user", "My name is Alice."),
            turn("assistant", "Hello Alice!"),
            turn("user", "What is my name?"),
        ]
    },
    "tools": {"input": [turn("user", "What's the weather?")], "tools": [FUNCTION]},
    "called": {
        "input": [
            turn("user", "What's the weather?"),
            {"type": "reasoning", "id": "rs_1", "summary": []},
            turn("assistant", [{"type": "output_text", "text": "Let me see."}]),
            {
                "type": "function_call",
                "call_id": "c1",
                "name": "get_weather",
                "arguments": '{"location": "here"}',
            },
            {"type": "function_call_output", "call_id": "c1", "output": "rain"},
        ],
        "tools": [FUNCTION],
    },
    "harmless": {
        "input": "a",
        "store": True,
        "service_tier": "auto",
        "reasoning": {"effort": "low"},
        "text": {"verbosity": "low"},
        "truncation": "disabled",
        "prompt_cache_key": "k",
        "prompt_cache_options": {"mode": "implicit", "ttl": "30m"},
        "background_options": {"completion_window": "soonest"},
        "max_tool_calls": 3,
        "conversation": None,
        "previous_response_id": None,
    },
    "refused": {
        "input": [
            turn("user", [{"type": "input_text", "text": "a", **BREAKPOINT}]),
            turn("assistant", [{"type": "refusal", "refusal": "No."}]),
            turn("user", "b"),
        ],
        "reasoning": {"context": "auto", "mode": "standard"},
    },
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_responses_have_the_required_fields(
    server: Live, fields: dict[str, Any], stream: bool
) -> None:
    body = {"model": "tiny", "max_output_tokens": 8, **fields, "stream": stream}
    with server.http() as http:
        reply = http.post("/v1/responses", json=body)
    assert reply.status_code == 200, reply.text
    if stream:
        lines = [line for line in reply.text.splitlines() if line.startswith("data: ")]
        response = json.loads(lines[-1].removeprefix("data: "))["response"]
    else:
        response = reply.json()
    assert set(response) >= REQUIRED
    assert response["output"]
    assert response["store"] is False
    assert response["text"]["verbosity"] in ("low", "medium", "high")
    assert response["status"] in ("completed", "incomplete")


@pytest.mark.parametrize("recommended", [{}, {"temperature": 0.6, "top_p": 0.9}])
@pytest.mark.parametrize("asked", [{}, {"temperature": 0.3}, {"top_p": 0.5}])
def test_the_sampling_that_was_used_is_reported(
    server: Live,
    client: OpenAI,
    recommended: dict[str, float],
    asked: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = GenerationConfig(do_sample=bool(recommended), **recommended)
    monkeypatch.setattr(server.engine.model, "generation_config", config)
    used: list[Request] = []
    submit = server.engine.submit_all

    def recorded(requests: list[Request]) -> Any:
        used.extend(requests)
        return submit(requests)

    monkeypatch.setattr(server.engine, "submit_all", recorded)
    reply = client.responses.create(model="tiny", input="a", max_output_tokens=1, **asked)
    [request] = used
    assert (reply.temperature, reply.top_p) == (
        request.sampling.temperature,
        request.sampling.top_p,
    )
    expected = {"temperature": 1.0, "top_p": 1.0, **recommended, **asked}
    assert {"temperature": reply.temperature, "top_p": reply.top_p} == expected


@pytest.mark.parametrize(
    "choice",
    [
        "required",
        {"type": "function", "name": "get_weather"},
        {
            "type": "allowed_tools",
            "mode": "required",
            "tools": [{"type": "function", "name": "get_weather"}],
        },
    ],
    ids=["required", "named", "allowed"],
)
def test_a_required_call_is_an_item_of_its_own(client: OpenAI, choice: Any) -> None:
    fields: dict[str, Any] = {
        "model": "tiny",
        "input": "the weather",
        "tools": [FUNCTION, {**FUNCTION, "name": "other"}],
        "tool_choice": choice,
        "max_output_tokens": 400,
        "temperature": 0,
        # A random model tends to generate white space, of which JSON allows any amount.
        "extra_body": {"frequency_penalty": 2},
    }
    if choice == "required":
        fields["tools"] = [FUNCTION]
    # The log probabilities of a call are those of no text.
    whole = client.responses.create(include=["message.output_text.logprobs"], **fields)
    [item] = whole.output
    assert item.type == "function_call"
    assert item.name == "get_weather"
    assert json.loads(item.arguments)["location"] in ("here", "there")
    events = list(client.responses.create(stream=True, **fields))
    kinds = [event.type for event in events]
    assert kinds[2:6] == [
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
    ]
    assert events[-1].response.output[0].arguments == item.arguments


def test_log_probabilities_on_request(client: OpenAI) -> None:
    reply = client.responses.create(
        model="tiny",
        input="the expert",
        max_output_tokens=5,
        include=["message.output_text.logprobs"],
        top_logprobs=2,
        temperature=0,
    )
    logprobs = reply.output[0].content[0].logprobs  # type: ignore[union-attr]
    assert reply.usage is not None
    assert len(logprobs) == reply.usage.output_tokens  # type: ignore[arg-type]
    assert all(len(token.top_logprobs) == 2 for token in logprobs)  # type: ignore[union-attr]


def test_calls_of_one_turn_are_one_message(server: Live, client: OpenAI) -> None:
    call = {"type": "function_call", "name": "get_weather", "arguments": "{}"}
    items: list[Any] = [
        turn("user", "a"),
        {**call, "call_id": "1"},
        {**call, "call_id": "2"},
        {"type": "function_call_output", "call_id": "1", "output": "x"},
        {"type": "function_call_output", "call_id": "2", "output": "y"},
    ]
    reply = client.responses.create(model="tiny", input=items, max_output_tokens=1)
    chat: list[Any] = [
        {"role": "user", "content": "a"},
        {
            "role": "assistant",
            "tool_calls": [
                {
                    "id": name,
                    "type": "function",
                    "function": {"name": "get_weather", "arguments": "{}"},
                }
                for name in "12"
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "x"},
        {"role": "tool", "tool_call_id": "2", "content": "y"},
    ]
    other = client.chat.completions.create(model="tiny", messages=chat, max_tokens=1)
    assert reply.usage is not None
    assert other.usage is not None
    assert reply.usage.input_tokens == other.usage.prompt_tokens


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"input": [turn("user", [{"type": "input_image", "image_url": "data:,"}])]},
            "images are not supported",
        ),
        (
            {"input": "a", "previous_response_id": "resp_1"},
            "previous_response_id is invalid: nothing is stored here; send the whole conversation",
        ),
        ({"input": "a", "conversation": "conv_1"}, "conversation is invalid: nothing is stored"),
        ({"input": "a", "extra_body": {"prompt": {"id": "p"}}}, "prompt is invalid: nothing is"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input.* nothing is stored"),
        ({"input": "a", "truncation": "auto"}, "truncation"),
        (
            {"input": "a", "tools": [{"type": "web_search"}]},
            "tools.0.type .* web_search would run on the server, which has none; leave it out",
        ),
        (
            {"input": "a", "tools": [{"type": "file_search", "vector_store_ids": ["vs_1"]}]},
            "file_search would run on the server",
        ),
        ({"input": "a", "tools": [{"type": "custom", "name": "f"}]}, "should be 'function'"),
        ({"input": [{"type": "message", "role": "user"}]}, "role user needs content"),
    ],
    ids=[
        "image",
        "previous",
        "conversation",
        "prompt",
        "reference",
        "truncation",
        "search",
        "file",
        "custom",
        "empty",
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    client: OpenAI, fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        client.responses.create(model="tiny", **fields)


@pytest.mark.parametrize("items", [[], [{"type": "reasoning"}], [{"type": "reasoning"}] * 2])
def test_an_input_without_a_message_is_refused(server: Live, items: list[Any]) -> None:
    with server.http() as http:
        reply = http.post("/v1/responses", json={"model": "tiny", "input": items})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "input"
