"""Every field of the newest `openai` client is accepted, or refused with a message that names it.

The fields are those of the client's own methods; a field without a value here is a failure, so that
a newer client shows what is missing. Accepted values must be ones that the server follows, or that
do not affect its answers; all others must be refused.
"""

import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any

import openai
from cases import Case, Target, expect, refused, run

ASKED: list[Any] = [{"role": "user", "content": "Name a colour."}]
FUNCTION: dict[str, Any] = {
    "name": "pick",
    "description": "Pick a digit.",
    "parameters": {"type": "object", "properties": {"digit": {"enum": [1, 2, 3]}}},
    "strict": True,
}
TOOL: dict[str, Any] = {"type": "function", "function": FUNCTION}
FLAT: dict[str, Any] = {"type": "function", **FUNCTION}
CALL = {"id": "call_1", "type": "function", "function": {"name": "pick", "arguments": "{}"}}
SCHEMA = {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}}
BREAKPOINT = {"prompt_cache_breakpoint": {"mode": "explicit", "ttl": "30m"}}
IMAGE_URL = {"url": "data:image/png;base64,aGk="}

NOT_FIELDS = {"extra_headers", "extra_query", "extra_body", "timeout"}

ACCEPTED: dict[str, dict[str, list[Any]]] = {
    "chat.completions": {
        "messages": [
            ASKED,
            [{"role": "system", "content": "Be brief."}, *ASKED],
            [{"role": "developer", "content": "Be brief."}, *ASKED],
            [{"role": "user", "content": [{"type": "text", "text": "a", **BREAKPOINT}]}],
            [{"role": "user", "content": "a", "name": "Ann"}],
            [*ASKED, {"role": "assistant", "content": "Red.", "refusal": None}, *ASKED],
            [
                *ASKED,
                {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
                *ASKED,
            ],
            [
                *ASKED,
                {"role": "assistant", "content": None, "tool_calls": [CALL], "audio": None},
                {"role": "tool", "content": "2", "tool_call_id": "call_1"},
            ],
        ],
        "frequency_penalty": [-2, 0.5],
        "logit_bias": [{"10": 5}, {}],
        "logprobs": [True, False],
        "max_completion_tokens": [4],
        "max_tokens": [4],
        "metadata": [{"topic": "colours"}],
        "modalities": [["text"]],
        "n": [1, 2],
        "parallel_tool_calls": [True, False],
        "prediction": [{"type": "content", "content": "Red."}],
        "presence_penalty": [2, -0.5],
        "prompt_cache_key": ["key"],
        "prompt_cache_options": [{"mode": "implicit", "ttl": "30m"}, {"mode": "explicit"}],
        "prompt_cache_retention": ["in_memory", "24h"],
        "reasoning_effort": ["none", "minimal", "low", "medium", "high", "xhigh"],
        "response_format": [
            {"type": "text"},
            {"type": "json_object"},
            {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}},
            {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}},
        ],
        "safety_identifier": ["someone"],
        "seed": [7, -1],
        "service_tier": ["auto", "default", "flex", "priority"],
        "stop": ["e", ["a", "b"], []],
        "store": [True, False],
        "stream_options": [{"include_usage": True}, {"include_obfuscation": False}],
        "temperature": [0, 2],
        "tool_choice": [
            "none",
            "auto",
            "required",
            {"type": "function", "function": {"name": "pick"}},
            {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [TOOL]}},
        ],
        "tools": [[TOOL], []],
        "top_logprobs": [3],
        "top_p": [0.5, 1],
        "user": ["someone"],
        "verbosity": ["low", "medium", "high"],
    },
    "completions": {
        "prompt": ["Once", ["Once", "Twice"], [10, 20], [[10, 20], [30]]],
        "best_of": [1],
        "echo": [True, False],
        "frequency_penalty": [0.5],
        "logit_bias": [{"10": 5}],
        "logprobs": [0, 5],
        "max_tokens": [0, 4],
        "n": [2],
        "presence_penalty": [0.5],
        "seed": [7],
        "stop": ["e", ["a", "b"]],
        "stream_options": [{"include_usage": True}],
        "suffix": [" and so on."],
        "temperature": [0],
        "top_p": [0.5],
        "user": ["someone"],
    },
    "responses": {
        "background": [False],
        "background_options": [{"completion_window": "soonest"}],
        "include": [["message.output_text.logprobs"], ["reasoning.encrypted_content"]],
        "input": [
            "Name a colour.",
            ASKED,
            [{"role": "developer", "content": "Be brief."}, *ASKED],
            [{"role": "user", "content": [{"type": "input_text", "text": "a", **BREAKPOINT}]}],
            [
                *ASKED,
                {
                    "type": "message",
                    "id": "msg_1",
                    "role": "assistant",
                    "status": "completed",
                    "phase": "final_answer",
                    "content": [{"type": "output_text", "text": "Red.", "annotations": []}],
                },
                *ASKED,
            ],
            [
                *ASKED,
                {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
                *ASKED,
            ],
            [
                *ASKED,
                {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"},
                {"type": "function_call", "call_id": "call_1", "name": "pick", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "call_1", "output": "2"},
            ],
        ],
        "instructions": ["Be brief."],
        "max_output_tokens": [16],
        "max_tool_calls": [3],
        "metadata": [{"topic": "colours"}],
        "parallel_tool_calls": [True, False],
        "prompt_cache_key": ["key"],
        "prompt_cache_options": [{"mode": "implicit"}],
        "prompt_cache_retention": ["24h"],
        "reasoning": [
            {"effort": "low", "summary": "auto"},
            {"context": "auto", "mode": "standard"},
        ],
        "safety_identifier": ["someone"],
        "service_tier": ["auto", "flex"],
        "store": [True, False],
        "stream_options": [{"include_obfuscation": False}],
        "temperature": [0],
        "text": [
            {"format": {"type": "text"}, "verbosity": "low"},
            {"format": {"type": "json_object"}},
            {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA, "strict": True}},
        ],
        "tool_choice": [
            "none",
            "auto",
            "required",
            {"type": "function", "name": "pick"},
            {
                "type": "allowed_tools",
                "mode": "required",
                "tools": [{"type": "function", "name": "pick"}],
            },
        ],
        "tools": [[FLAT], []],
        "top_logprobs": [3],
        "top_p": [0.5],
        "truncation": ["disabled"],
        "user": ["someone"],
    },
    "embeddings": {
        "input": ["a text", ["a", "b"], [10, 20], [[10], [20, 30]]],
        "dimensions": [8],
        "encoding_format": ["float", "base64"],
        "user": ["someone"],
    },
}

REFUSED: dict[str, dict[str, list[Any]]] = {
    "chat.completions": {
        "messages": [
            [{"role": "user", "content": [{"type": "image_url", "image_url": IMAGE_URL}]}],
            [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}],
            [{"role": "user", "content": [{"type": "file", "file": {"file_id": "f"}}]}],
            [*ASKED, {"role": "function", "name": "pick", "content": "2"}],
            [],
        ],
        "audio": [{"format": "wav", "voice": "alloy"}],
        "function_call": ["auto", {"name": "pick"}],
        "functions": [[FUNCTION]],
        "modalities": [["text", "audio"]],
        "moderation": [{"model": "omni-moderation-latest"}],
        "tools": [[{"type": "custom", "custom": {"name": "code"}}]],
        "web_search_options": [{"search_context_size": "low"}],
        "n": [0, 1000],
        "temperature": [3],
        "verbosity": ["chatty"],
    },
    "completions": {"best_of": [3], "max_tokens": [-1], "prompt": [[]]},
    "responses": {
        "access_programs": [{"cyber": "standard"}],
        "background": [True],
        "background_options": [{"completion_window": "2h"}],
        "context_management": [[{"type": "compaction"}]],
        "conversation": ["conv_1", {"id": "conv_1"}],
        "image": [{"context_compression": "enabled"}],
        "input": [
            [{"role": "user", "content": [{"type": "input_image", "image_url": "data:,"}]}],
            [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}],
            [{"type": "item_reference", "id": "msg_1"}],
        ],
        "moderation": [{"model": "omni-moderation-latest"}],
        "previous_response_id": ["resp_1"],
        "prompt": [{"id": "pmpt_1"}],
        "tools": [
            [{"type": "web_search"}],
            [{"type": "file_search", "vector_store_ids": ["vs_1"]}],
            [{"type": "code_interpreter", "container": {"type": "auto"}}],
            [{"type": "mcp", "server_label": "a", "server_url": "https://a.example"}],
            [{"type": "custom", "name": "code"}],
        ],
        "truncation": ["auto"],
    },
    "embeddings": {"dimensions": [1 << 20], "encoding_format": ["int8"], "input": [[]]},
}

NEEDS: dict[str, dict[str, Any]] = {
    "tool_choice": {"tools": [TOOL]},
    "parallel_tool_calls": {"tools": [TOOL]},
    "top_logprobs": {"logprobs": True},
    "stream_options": {"stream": True},
}
"""Other fields that a field requires."""

FLAT_NEEDS: dict[str, dict[str, Any]] = {
    **NEEDS,
    "tool_choice": {"tools": [FLAT]},
    "parallel_tool_calls": {"tools": [FLAT]},
    "top_logprobs": {"include": ["message.output_text.logprobs"]},
}


def cases(target: Target) -> Iterator[tuple[str, Case]]:
    client = openai.OpenAI(base_url=f"{target.url}/v1", api_key="none", max_retries=0)
    routes: dict[str, tuple[Any, dict[str, Any], dict[str, dict[str, Any]]]] = {
        "chat.completions": (
            client.chat.completions.create,
            {"messages": ASKED, "max_tokens": 24},
            NEEDS,
        ),
        "completions": (client.completions.create, {"prompt": "Once", "max_tokens": 8}, NEEDS),
        "responses": (
            client.responses.create,
            {"input": "Name a colour.", "max_output_tokens": 24},
            FLAT_NEEDS,
        ),
        "embeddings": (client.embeddings.create, {"input": "a text"}, {}),
    }
    for route, (create, usual, needs) in routes.items():
        accepted = ACCEPTED[route]
        forbidden = REFUSED[route]
        for field in inspect.signature(create).parameters.keys() - NOT_FIELDS:
            if field not in accepted | forbidden | {"model": [], "stream": []}:
                yield f"{route}: {field} is known", partial(expect, False, "it has no value here")
        usual = {"model": target.model, **usual}
        yield f"{route}: plain", partial(accept, create, usual)
        if "stream" in inspect.signature(create).parameters:
            yield f"{route}: stream", partial(accept, create, {**usual, "stream": True})
        for field, values in accepted.items():
            for value in [*values, *([None] if field not in usual else [])]:
                fields = {**usual, **needs.get(field, {}), field: value}
                yield f"{route}: {field} = {value!r:.60} accepted", partial(accept, create, fields)
        for field, values in forbidden.items():
            for value in values:
                fields = {**usual, **needs.get(field, {}), field: value}
                yield (
                    f"{route}: {field} = {value!r:.60} refused",
                    partial(refuse, create, fields, field),
                )
        yield f"{route}: unknown model", partial(unknown_model, create, usual)


def accept(create: Any, fields: dict[str, Any]) -> None:
    reply = create(**fields)
    if fields.get("stream"):
        reply = list(reply)
    expect(reply, "an empty reply")


def refuse(create: Any, fields: dict[str, Any], field: str) -> None:
    with refused(openai.BadRequestError, field):
        create(**fields)


def unknown_model(create: Any, fields: dict[str, Any]) -> None:
    with refused(openai.NotFoundError, "no-such-model"):
        create(**{**fields, "model": "no-such-model"})


if __name__ == "__main__":
    run(cases, "openai")
