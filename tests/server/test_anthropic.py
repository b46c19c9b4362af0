"""Anthropic's own client against `/v1/messages`: documented features work, and a stream has the
same content as a whole reply.
"""

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import anthropic
import pytest
from live_server import CONTEXT, Live

from deepseek.engine.request import TokenUsage
from deepseek.server.dialects.anthropic import MessageEvents

ASKED: list[Any] = [{"role": "user", "content": "the expert of the model"}]
TOOL: dict[str, Any] = {
    "name": "pick",
    "description": "Pick a digit.",
    "input_schema": {
        "type": "object",
        "properties": {"digit": {"enum": [1, 2, 3]}},
        "required": ["digit"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def messages(server: Live) -> Iterator[Any]:
    server.engine.plug(server.folder / "one.safetensors")
    server.engine.plug(server.folder / "two.safetensors")
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def asked(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a request; sampling fields, which newer clients lack, go into the extra body."""
    request = {"model": "tiny", "max_tokens": 12, "messages": ASKED, "temperature": 0, **fields}
    body = dict(request.pop("extra_body", {}))
    body |= {
        name: request.pop(name) for name in ("temperature", "top_p", "top_k") if name in request
    }
    return {**request, "extra_body": body}


def ask(client: Any, **fields: Any) -> Any:
    return client.messages.create(**asked(fields))


REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "top_p": 0.9, "top_k": 20},
    "one_token": {"max_tokens": 1},
    "system": {"system": "Be brief."},
    "system_blocks": {
        "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    },
    "blocks": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]}]
    },
    "turns": {"messages": [*ASKED, {"role": "assistant", "content": "a value"}, *ASKED]},
    "prefilled": {"messages": [*ASKED, {"role": "assistant", "content": "The value"}]},
    "stops": {"stop_sequences": ["e", "the"], "max_tokens": 60},
    "expert": {"model": "tiny+one"},
    "no_experts": {"model": "tiny+none"},
    "armed": {"extra_body": {"experts": {"arm": ["two"]}}},
    "metadata": {"metadata": {"user_id": "someone"}},
    "tier": {"service_tier": "auto"},
    "no_thinking": {"thinking": {"type": "disabled"}},
    "thinking_if_it_can": {"extra_body": {"thinking": {"type": "adaptive"}, "speed": "standard"}},
    "tools": {"tools": [TOOL]},
    "tools_of_newer_fields": {"tools": [{**TOOL, "eager_input_streaming": True}]},
    "tool_none": {"tools": [TOOL], "tool_choice": {"type": "none"}},
    "thoughts_of_others": {
        "messages": [
            *ASKED,
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm", "signature": "s"},
                    {"type": "text", "text": "a value"},
                ],
            },
            *ASKED,
        ]
    },
    "result": {
        "tools": [TOOL],
        "messages": [
            *ASKED,
            {
                "role": "assistant",
                "content": [
                    {"type": "tool_use", "id": "t1", "name": "pick", "input": {"digit": 1}}
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": "done"},
                    {"type": "text", "text": "and now?"},
                ],
            },
        ],
    },
}


@pytest.mark.parametrize("fields", REQUESTS.values(), ids=REQUESTS)
def test_whole_replies_are_messages(messages: Any, fields: dict[str, Any]) -> None:
    reply = ask(messages, **fields)
    assert reply.type == "message"
    assert reply.role == "assistant"
    assert reply.stop_reason in ("end_turn", "max_tokens", "stop_sequence")
    assert (reply.stop_sequence is None) == (reply.stop_reason != "stop_sequence")
    assert all(block.type == "text" for block in reply.content)
    assert 0 < reply.usage.output_tokens <= fields.get("max_tokens", 12)
    assert reply.usage.input_tokens + reply.usage.cache_read_input_tokens > 0


@pytest.mark.parametrize("fields", REQUESTS.values(), ids=REQUESTS)
def test_streams_add_up_to_the_whole_reply(messages: Any, fields: dict[str, Any]) -> None:
    whole = ask(messages, **{**fields, "temperature": 0})
    with messages.messages.stream(**asked({**fields, "temperature": 0})) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"
    assert kinds.count("content_block_start") == kinds.count("content_block_stop")
    assert [block.text for block in final.content] == [block.text for block in whole.content]
    assert final.stop_reason == whole.stop_reason
    assert final.stop_sequence == whole.stop_sequence
    assert final.usage.output_tokens == whole.usage.output_tokens


@pytest.mark.parametrize(
    "choice", [{"type": "any"}, {"type": "tool", "name": "pick"}], ids=["any", "named"]
)
def test_a_required_call_is_a_tool_use_block(messages: Any, choice: dict[str, Any]) -> None:
    fields = {"tools": [TOOL], "tool_choice": choice, "max_tokens": 400}
    reply = ask(messages, **fields)
    assert reply.stop_reason == "tool_use"
    [block] = reply.content
    assert block.type == "tool_use"
    assert block.name == "pick"
    assert block.input["digit"] in (1, 2, 3)
    with messages.messages.stream(**asked(fields)) as stream:
        final = stream.get_final_message()
    assert final.content[0].input == block.input
    assert final.stop_reason == "tool_use"
    result = {"type": "tool_result", "tool_use_id": block.id, "content": "done"}
    turns = [{"role": "assistant", "content": reply.content}, {"role": "user", "content": [result]}]
    assert ask(messages, tools=[TOOL], messages=[*ASKED, *turns]).type == "message"


@pytest.mark.parametrize("call", [False, True])
def test_replies_have_the_fields_that_the_published_schema_requires(
    server: Live, call: bool
) -> None:
    # Greedy: a sampled answer may end at once, and then has no block to look at.
    body = {"model": "tiny", "max_tokens": 400 if call else 12, "messages": ASKED}
    body |= {"temperature": 0}
    body |= {"tools": [TOOL], "tool_choice": {"type": "any"}} if call else {}
    with server.http() as http:
        reply = http.post("/v1/messages", json=body).json()
    assert {"id", "role", "stop_reason", "stop_sequence", "stop_details", "container"} <= set(reply)
    [block] = reply["content"]
    assert ("caller" if call else "citations") in block
    assert set(reply["usage"]) == {
        "cache_creation",
        "cache_creation_input_tokens",
        "cache_read_input_tokens",
        "inference_geo",
        "input_tokens",
        "output_tokens",
        "output_tokens_details",
        "server_tool_use",
        "service_tier",
    }


def test_a_schema_constrains_the_answer(messages: Any) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    wanted = {
        "format": {"type": "json_schema", "schema": {**schema, "additionalProperties": False}}
    }
    reply = ask(messages, max_tokens=300, extra_body={"output_config": wanted})
    assert json.loads(reply.content[0].text) in ({"ok": True}, {"ok": False})


def test_a_stop_text_is_reported(messages: Any) -> None:
    text = ask(messages, max_tokens=40).content[0].text
    reply = ask(messages, max_tokens=40, stop_sequences=["never to be seen", text[4:6]])
    assert reply.stop_reason == "stop_sequence"
    assert reply.stop_sequence == text[4:6]
    assert reply.content[0].text == text[: text.index(text[4:6])]


def test_a_call_ends_for_no_stop_text() -> None:
    job = SimpleNamespace(usage=lambda: TokenUsage(3))
    chunks: Any = SimpleNamespace(job=job, head={"model": "tiny"}, used=dict)
    choice = {"finish_reason": "tool_calls", "stop_reason": "</tool_call>"}
    delta = next(MessageEvents(chunks)._end(choice))["delta"]
    assert delta == {"stop_reason": "tool_use", "stop_sequence": None}


def test_a_prefilled_answer_goes_on_in_its_own_turn(server: Live, messages: Any) -> None:
    turn = {"role": "assistant", "content": "The value"}
    counted = messages.messages.count_tokens(model="tiny", messages=[*ASKED, turn]).input_tokens
    opened = messages.messages.count_tokens(model="tiny", messages=ASKED).input_tokens
    encoded = server.engine.tokenizer("The value", add_special_tokens=False).input_ids
    assert counted == opened + len(encoded)


def test_count_is_the_number_of_prompt_tokens(messages: Any) -> None:
    fields = {"model": "tiny", "messages": ASKED, "system": "Be brief.", "tools": [TOOL]}
    counted = messages.messages.count_tokens(**fields).input_tokens
    usage = messages.messages.create(**fields, max_tokens=1).usage
    assert counted == usage.input_tokens + usage.cache_read_input_tokens


def test_models_are_listed(messages: Any) -> None:
    listed = messages.models.list()
    assert "tiny+one" in [model.id for model in listed]
    assert messages.models.retrieve("tiny+one").display_name == "tiny+one"


REFUSED: dict[str, tuple[dict[str, Any], type[anthropic.APIStatusError], str]] = {
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        anthropic.BadRequestError,
        "images are not supported",
    ),
    "model": ({"model": "other"}, anthropic.NotFoundError, "no model"),
    "thinking": (
        {"extra_body": {"thinking": {"type": "enabled", "budget_tokens": 2000}}},
        anthropic.BadRequestError,
        "thinking",
    ),
    "field": ({"extra_body": {"no_such": 1}}, anthropic.BadRequestError, "no_such"),
    "long": (
        {"messages": [{"role": "user", "content": "the " * CONTEXT * 2}]},
        anthropic.BadRequestError,
        "context",
    ),
    "tool": (
        {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "other"}},
        anthropic.BadRequestError,
        "tool_choice",
    ),
    "server_tool": (
        {"tools": [{"type": "web_search_20250305", "name": "web_search", "max_uses": 3}]},
        anthropic.BadRequestError,
        "web_search_20250305 would run on the server",
    ),
    "only_assistant": (
        {"messages": [{"role": "assistant", "content": "a"}]},
        anthropic.BadRequestError,
        "end with a user's message",
    ),
    "call_without_result": (
        {
            "messages": [
                *ASKED,
                {
                    "role": "assistant",
                    "content": [{"type": "tool_use", "id": "a", "name": "pick", "input": {}}],
                },
            ]
        },
        anthropic.BadRequestError,
        "end with a user's message",
    ),
}


@pytest.mark.parametrize(("fields", "kind", "words"), REFUSED.values(), ids=REFUSED)
def test_errors_have_the_layout_of_this_api(
    messages: Any, fields: dict[str, Any], kind: type[anthropic.APIStatusError], words: str
) -> None:
    with pytest.raises(kind) as caught:
        ask(messages, **fields)
    body: Any = caught.value.body
    assert body["type"] == "error"
    assert body["error"]["type"] in ("invalid_request_error", "not_found_error")
    assert words in body["error"]["message"]


def test_null_fields_ask_for_nothing(server: Live, messages: Any) -> None:
    body = {"model": "tiny", "max_tokens": 2, "messages": ASKED, "container": None, "speed": None}
    with server.http() as http:
        assert http.post("/v1/messages", json=body).status_code == 200
