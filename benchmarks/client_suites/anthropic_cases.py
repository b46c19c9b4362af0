"""Anthropic's own client: messages whole and streamed, tools, counting, models, errors."""

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import anthropic
from cases import Case, Target, expect, refused, run

ASKED: list[Any] = [{"role": "user", "content": "Name a colour and say why you like it."}]
TOOL: dict[str, Any] = {
    "name": "pick",
    "description": "Pick a digit.",
    "input_schema": {
        "type": "object",
        "properties": {"digit": {"enum": [1, 2, 3]}},
        "required": ["digit"],
    },
}
CALLED: list[Any] = [
    *ASKED,
    {
        "role": "assistant",
        "content": [
            {"type": "text", "text": "I pick."},
            {"type": "tool_use", "id": "toolu_1", "name": "pick", "input": {"digit": 2}},
        ],
    },
    {
        "role": "user",
        "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "done"}],
    },
]
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "count": {"type": "integer"}},
    "required": ["colour"],
}
CACHED = {"type": "ephemeral"}

REQUESTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one token": {"max_tokens": 1},
    "temperature": {"extra_body": {"temperature": 0.7}},
    "top_p and top_k": {"extra_body": {"top_p": 0.9, "top_k": 20}},
    "system": {"system": "Be brief."},
    "system of blocks": {"system": [{"type": "text", "text": "Be brief."}]},
    "cache control": {"system": [{"type": "text", "text": "Be brief.", "cache_control": CACHED}]},
    "cache control of an hour": {
        "system": [{"type": "text", "text": "Be brief.", "cache_control": {**CACHED, "ttl": "1h"}}]
    },
    "blocks": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]}]
    },
    "several turns": {"messages": [*ASKED, {"role": "assistant", "content": "Blue."}, *ASKED]},
    "two turns of the user": {"messages": [*ASKED, *ASKED]},
    "continued answer": {"messages": [*ASKED, {"role": "assistant", "content": "My colour"}]},
    "stop sequence": {"stop_sequences": ["e"], "max_tokens": 64},
    "several stop sequences": {"stop_sequences": ["a", "the", "\n"], "max_tokens": 64},
    "metadata": {"metadata": {"user_id": "u-1"}},
    "service tier": {"service_tier": "auto"},
    "tools": {"tools": [TOOL]},
    "tool of newer fields": {"tools": [{**TOOL, "strict": True, "eager_input_streaming": True}]},
    "tools, none allowed": {"tools": [TOOL], "tool_choice": {"type": "none"}},
    "result of a call": {"messages": CALLED, "tools": [TOOL]},
    "failed call": {
        "messages": [
            *CALLED[:2],
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "toolu_1", "is_error": True},
                    {"type": "text", "text": "Try again."},
                ],
            },
        ],
        "tools": [TOOL],
    },
    "speed": {"extra_body": {"speed": "standard"}},
    "adaptive thinking": {"thinking": {"type": "adaptive"}},
    "thinking off": {"thinking": {"type": "disabled"}},
    "unicode": {"messages": [{"role": "user", "content": "Grüße aus 東京 🗼"}]},
}

CALLS: dict[str, dict[str, Any]] = {
    "any": {"type": "any"},
    "named": {"type": "tool", "name": "pick"},
    "one at a time": {"type": "any", "disable_parallel_tool_use": True},
}

IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
DOCUMENT = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "x"}}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "image": ({"messages": [{"role": "user", "content": [IMAGE]}]}, "images"),
    "document": ({"messages": [{"role": "user", "content": [DOCUMENT]}]}, "documents"),
    "thinking": ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
    "server tool": ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools"),
    "no tokens": ({"max_tokens": 0}, "max_tokens"),
    "no messages": ({"messages": []}, "messages"),
    "too long": ({"messages": [{"role": "user", "content": "word " * 40_000}]}, "context"),
    "unknown field": ({"extra_body": {"best_of_all": 3}}, "best_of_all"),
}


def cases(target: Target) -> Iterator[tuple[str, Case]]:
    client: Any = anthropic.Anthropic(base_url=target.url, api_key="none", max_retries=0)
    usual = {"model": target.model, "max_tokens": 16, "messages": ASKED}
    for name, fields in REQUESTS.items():
        yield f"{name}, whole", partial(whole, client, {**usual, **fields})
        yield f"{name}, streamed", partial(streamed, client, {**usual, **fields})
    for name, choice in CALLS.items():
        asked = {**usual, "max_tokens": 128, "tools": [TOOL], "tool_choice": choice}
        yield f"call, {name}", partial(called, client, asked)
        yield f"call, {name}, streamed", partial(called_in_stream, client, asked)
    yield "JSON schema", partial(structured, client, {**usual, "max_tokens": 128})
    for name, (fields, word) in REFUSED.items():
        yield f"refused: {name}", partial(refuse, client, {**usual, **fields}, word)
    yield "unknown model", partial(unknown_model, client, usual)
    yield "count of tokens", partial(counted, client, target, ASKED)
    yield "count of tokens with tools", partial(counted, client, target, CALLED, tools=[TOOL])
    yield (
        "models",
        lambda: expect(
            target.model in [model.id for model in client.models.list()], "the model is not listed"
        ),
    )
    yield (
        "one model",
        lambda: expect(client.models.retrieve(target.model).id == target.model, "another model"),
    )
    yield "event names", partial(event_names, client, usual)
    yield "raw response", partial(raw, client, usual)


def whole(client: Any, fields: dict[str, Any]) -> None:
    message = client.messages.create(**fields)
    check(message, fields)


def check(message: Any, fields: dict[str, Any]) -> None:
    expect(message.type == "message" and message.role == "assistant", f"{message}")
    expect(message.usage.input_tokens + message.usage.cache_read_input_tokens > 0, "no input")
    expect(0 <= message.usage.output_tokens <= fields["max_tokens"], f"{message.usage}")
    reasons = ("end_turn", "max_tokens", "stop_sequence", "tool_use")
    expect(message.stop_reason in reasons, f"{message.stop_reason}")
    if message.stop_reason == "stop_sequence":
        expect(message.stop_sequence in fields["stop_sequences"], f"{message.stop_sequence}")


def streamed(client: Any, fields: dict[str, Any]) -> None:
    with client.messages.stream(**fields) as stream:
        text = "".join(stream.text_stream)
        message = stream.get_final_message()
    check(message, fields)
    blocks = [block.text for block in message.content if block.type == "text"]
    expect(text == "".join(blocks), "the stream's text is not that of its message")


def called(client: Any, fields: dict[str, Any]) -> None:
    check_call(client.messages.create(**fields))


def called_in_stream(client: Any, fields: dict[str, Any]) -> None:
    with client.messages.stream(**fields) as stream:
        check_call(stream.get_final_message())


def check_call(message: Any) -> None:
    expect(message.stop_reason == "tool_use", f"{message.stop_reason}")
    block = message.content[0]
    expect(block.type == "tool_use" and block.name == "pick", f"{block}")
    expect(block.input.get("digit") in (1, 2, 3), f"{block.input}")


def structured(client: Any, fields: dict[str, Any]) -> None:
    wanted = {"format": {"type": "json_schema", "schema": SCHEMA}}
    message = client.messages.create(**fields, output_config=wanted)
    answer = json.loads(message.content[0].text)
    expect(answer["colour"] in ("red", "blue"), f"{answer}")


def refuse(client: Any, fields: dict[str, Any], word: str) -> None:
    with refused(anthropic.BadRequestError, word):
        client.messages.create(**fields)


def unknown_model(client: Any, fields: dict[str, Any]) -> None:
    with refused(anthropic.NotFoundError, "no-such-model"):
        client.messages.create(**{**fields, "model": "no-such-model"})


def counted(client: Any, target: Target, messages: list[Any], **fields: Any) -> None:
    asked = {"model": target.model, "messages": messages, **fields}
    count = client.messages.count_tokens(**asked).input_tokens
    usage = client.messages.create(**asked, max_tokens=1).usage
    expect(count == usage.input_tokens + usage.cache_read_input_tokens, f"{count}: {usage}")


def event_names(client: Any, fields: dict[str, Any]) -> None:
    names = [event.type for event in client.messages.create(**fields, stream=True)]
    expect(names[:2] == ["message_start", "content_block_start"], f"{names[:2]}")
    expect(names[-2:] == ["message_delta", "message_stop"], f"{names[-2:]}")


def raw(client: Any, fields: dict[str, Any]) -> None:
    reply = client.messages.with_raw_response.create(**fields)
    expect(reply.headers["content-type"].startswith("application/json"), f"{reply.headers}")
    expect(reply.parse().content, "an empty message")


if __name__ == "__main__":
    run(cases, "anthropic")
