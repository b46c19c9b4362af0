"""LiteLLM: the same server through its providers, such as OpenAI, vLLM, Anthropic and Ollama."""

import asyncio
import json
import os
from collections.abc import Iterator
from functools import partial
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # otherwise it is downloaded on import

import litellm
from cases import Case, Target, expect, refused, run

ASKED: list[Any] = [{"role": "user", "content": "Name a colour and say why you like it."}]
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "pick",
        "description": "Pick a digit.",
        "parameters": {
            "type": "object",
            "properties": {"digit": {"enum": [1, 2, 3]}},
            "required": ["digit"],
        },
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}},
    "required": ["colour"],
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}

PROVIDERS = {
    "openai": "/v1",
    "hosted_vllm": "/v1",
    "litellm_proxy": "/v1",
    "lm_studio": "/v1",
    "llamafile": "/v1",
    "anthropic": "",
    "ollama": "",
    "ollama_chat": "",
}
"""Provider -> path appended to the server's address."""


def cases(target: Target) -> Iterator[tuple[str, Case]]:
    litellm.telemetry = False
    for provider, path in PROVIDERS.items():
        usual = {
            "model": f"{provider}/{target.model}",
            "api_base": target.url + path,
            "api_key": "none",
            "messages": ASKED,
            "max_tokens": 16,
            "num_retries": 0,
        }
        yield f"{provider}, whole", partial(whole, usual)
        yield f"{provider}, streamed", partial(streamed, usual)
        yield f"{provider}, asynchronous", partial(asynchronous, usual)
        yield f"{provider}, stop", partial(whole, {**usual, "stop": ["e"]})
        yield f"{provider}, unknown model", partial(unknown_model, provider, usual)
    openai = {**usual, "model": f"openai/{target.model}", "api_base": target.url + "/v1"}
    anthropic = {**usual, "model": f"anthropic/{target.model}", "api_base": target.url}
    for name, fields in {"openai": openai, "anthropic": anthropic}.items():
        yield f"{name}, required call", partial(called, fields)
    yield "openai, JSON schema", partial(structured, openai)
    yield (
        "ollama_chat, JSON schema",
        partial(
            structured, {**usual, "model": f"ollama_chat/{target.model}", "api_base": target.url}
        ),
    )
    yield "openai, log probabilities", partial(logprobs, openai)
    yield "openai, two choices", partial(two, openai)
    yield "openai, seed", partial(repeated, openai)
    yield "openai, image", partial(image, openai)
    yield "openai, too long", partial(too_long, openai)
    connection = {"api_base": openai["api_base"], "api_key": "none"}
    yield "text completion", partial(text, target, connection)
    yield "embeddings", partial(embedded, target, connection)
    yield "responses", partial(responses, target, connection)


def whole(fields: dict[str, Any]) -> None:
    reply = litellm.completion(**fields)
    expect(reply.choices[0].finish_reason in ("stop", "length"), f"{reply}")
    expect(0 < reply.usage.completion_tokens <= fields["max_tokens"], f"{reply.usage}")


def streamed(fields: dict[str, Any]) -> None:
    chunks = list(litellm.completion(**fields, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    expect(text, "no text")
    expect(any(c.choices[0].finish_reason for c in chunks if c.choices), "no finish reason")


def asynchronous(fields: dict[str, Any]) -> None:
    async def several() -> list[Any]:
        return await asyncio.gather(*(litellm.acompletion(**fields) for _ in range(3)))

    expect(len(asyncio.run(several())) == 3, "not three replies")


def unknown_model(provider: str, fields: dict[str, Any]) -> None:
    with refused(Exception, "no-such-model"):
        litellm.completion(**{**fields, "model": f"{provider}/no-such-model"})


def called(fields: dict[str, Any]) -> None:
    asked = {**fields, "max_tokens": 128, "tools": [TOOL], "tool_choice": "required"}
    reply = litellm.completion(**asked)
    call = reply.choices[0].message.tool_calls[0].function
    expect(call.name == "pick" and json.loads(call.arguments)["digit"] in (1, 2, 3), f"{call}")


def structured(fields: dict[str, Any]) -> None:
    asked = {**fields, "max_tokens": 128, "response_format": FORMAT}
    content = litellm.completion(**asked).choices[0].message.content
    expect(json.loads(content)["colour"] in ("red", "blue"), content)


def logprobs(fields: dict[str, Any]) -> None:
    reply = litellm.completion(**fields, logprobs=True, top_logprobs=2)
    found = reply.choices[0].logprobs.content
    expect(len(found) == reply.usage.completion_tokens, f"{len(found)} entries")


def two(fields: dict[str, Any]) -> None:
    expect(len(litellm.completion(**fields, n=2).choices) == 2, "not two choices")


def repeated(fields: dict[str, Any]) -> None:
    texts = {
        litellm.completion(**fields, seed=7, temperature=1).choices[0].message.content
        for _ in range(2)
    }
    expect(len(texts) == 1, "one seed gave two texts")


def image(fields: dict[str, Any]) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}
    with refused(litellm.BadRequestError, "images"):
        litellm.completion(**{**fields, "messages": [{"role": "user", "content": [part]}]})


def too_long(fields: dict[str, Any]) -> None:
    with refused(litellm.ContextWindowExceededError, "context"):
        litellm.completion(**{**fields, "messages": [{"role": "user", "content": "a b " * 20_000}]})


def text(target: Target, connection: dict[str, Any]) -> None:
    reply = litellm.text_completion(
        model=f"text-completion-openai/{target.model}", prompt="Once", max_tokens=8, **connection
    )
    expect(reply.choices[0].text, f"{reply}")


def embedded(target: Target, connection: dict[str, Any]) -> None:
    reply = litellm.embedding(model=f"openai/{target.model}", input=["a", "b"], **connection)
    expect(len(reply.data) == 2, f"{len(reply.data)} vectors")


def responses(target: Target, connection: dict[str, Any]) -> None:
    reply = litellm.responses(
        model=f"openai/{target.model}", input="Name a colour.", max_output_tokens=16, **connection
    )
    expect(reply.output[0].content[0].text, f"{reply}")


if __name__ == "__main__":
    run(cases, "litellm")
