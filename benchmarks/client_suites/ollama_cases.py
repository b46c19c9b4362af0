"""Ollama's own client: chat, generate, streaming, tools, formats, embeddings, model lists."""

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import ollama
from cases import Case, Target, expect, refused, run

ASKED: list[Any] = [{"role": "user", "content": "Name a colour and say why you like it."}]
BRIEF = {"num_predict": 16}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}},
    "required": ["colour"],
}
CALL = {"function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
LAST = {"role": "assistant", "content": "My colour"}
RUNNER = {
    "num_ctx": 4096,
    "num_batch": 512,
    "num_gpu": 0,
    "main_gpu": 0,
    "num_thread": 2,
    "num_keep": 4,
    "repeat_last_n": 64,
    "low_vram": False,
    "use_mmap": True,
    "use_mlock": False,
    "numa": False,
}

CHATS: dict[str, dict[str, Any]] = {
    "plain": {},
    "system": {"messages": [{"role": "system", "content": "Be brief."}, *ASKED]},
    "several turns": {"messages": [*ASKED, {"role": "assistant", "content": "Blue."}, *ASKED]},
    "continued answer": {"messages": [*ASKED, LAST]},
    "result of a call": {
        "messages": [
            *ASKED,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "3", "tool_name": "add"},
        ],
        "tools": [TOOL],
    },
    "tools": {"tools": [TOOL]},
    "keep alive": {"keep_alive": "10m"},
    "thinking off": {"think": False},
    "log probabilities": {"logprobs": True, "top_logprobs": 3},
    "unicode": {"messages": [{"role": "user", "content": "Grüße aus 東京 🗼"}]},
}

OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "sampling": {"temperature": 0.8, "top_p": 0.9, "top_k": 40},
    "min_p": {"min_p": 0.05},
    "penalties": {"repeat_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    "stop": {"stop": ["\n", "e"]},
    "no limit": {"num_predict": -1, "stop": ["e"]},
    "runner": RUNNER,
    "older runner": {"f16_kv": True, "logits_all": False, "vocab_only": False},
    "off": {"mirostat": 0, "tfs_z": 1.0, "typical_p": 1.0, "penalize_newline": False},
}

PROMPTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "system": {"system": "Be brief."},
    "raw": {"raw": True},
    "keep alive": {"keep_alive": 300},
    "thinking off": {"think": False},
    "log probabilities": {"logprobs": True, "top_logprobs": 2},
    "null fields": {"suffix": "", "template": "", "context": []},
}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "image": ({"messages": [{**ASKED[0], "images": ["aGk="]}]}, "images"),
    "thinking": ({"think": True}, "think"),
    "mirostat": ({"options": {"mirostat": 2}}, "mirostat"),
    "top_p": ({"options": {"top_p": 2}}, "top_p"),
    "unknown option": ({"options": {"draft_depth": 2}}, "draft_depth"),
    "too long": ({"messages": [{"role": "user", "content": "word " * 40_000}]}, "context"),
}


def cases(target: Target) -> Iterator[tuple[str, Case]]:
    client = ollama.Client(host=target.url)
    usual = {"model": target.model, "messages": ASKED, "options": BRIEF}
    for name, fields in CHATS.items():
        yield f"chat, {name}, whole", partial(chat, client, {**usual, **fields})
        yield f"chat, {name}, streamed", partial(chat_in_stream, client, {**usual, **fields})
    for name, options in OPTIONS.items():
        asked = {**usual, "options": {**BRIEF, **options}}
        yield f"options, {name}", partial(chat, client, asked)
    prompted = {"model": target.model, "prompt": "Once upon a time", "options": BRIEF}
    for name, fields in PROMPTS.items():
        yield f"generate, {name}, whole", partial(generate, client, {**prompted, **fields})
        yield (
            f"generate, {name}, streamed",
            partial(generate_in_stream, client, {**prompted, **fields}),
        )
    for name, form in {"JSON": "json", "schema": SCHEMA}.items():
        long = {"num_predict": 200, "temperature": 0, "frequency_penalty": target.penalty}
        yield (f"chat, format {name}", partial(formatted, client, {**usual, "options": long}, form))
        yield (
            f"generate, format {name}",
            partial(formatted_prompt, client, {**prompted, "options": long}, form),
        )
    for name, (fields, word) in REFUSED.items():
        yield f"refused: {name}", partial(refuse, client, {**usual, **fields}, word)
    yield from lists(client, target)


def lists(client: ollama.Client, target: Target) -> Iterator[tuple[str, Case]]:
    model = target.model
    yield "tags", lambda: expect(model in [m.model for m in client.list().models], "not listed")
    yield "ps", lambda: expect(model in [m.model for m in client.ps().models], "not loaded")
    yield "show", lambda: expect("completion" in client.show(model).capabilities, "no completion")
    yield "show, latest", lambda: expect(client.show(f"{model}:latest").details, "no details")
    yield "load", lambda: expect(client.generate(model, "").done, "not loaded")
    yield "load by chat", lambda: expect(client.chat(model, []).done, "not loaded")
    yield "embed", lambda: expect(len(client.embed(model, "a text").embeddings) == 1, "not one")
    yield (
        "embed several",
        lambda: expect(len(client.embed(model, ["a", "b"]).embeddings) == 2, "not two"),
    )
    yield (
        "embed, dimensions",
        lambda: expect(len(client.embed(model, "a", dimensions=8).embeddings[0]) == 8, "not 8"),
    )
    yield "embeddings", lambda: expect(client.embeddings(model, "a text").embedding, "no vector")
    yield "unknown model", partial(unknown_model, client)


def chat(client: ollama.Client, fields: dict[str, Any]) -> None:
    reply = client.chat(**fields)
    expect(reply.done and reply.message.role == "assistant", f"{reply}")
    counted(reply, fields)


def chat_in_stream(client: ollama.Client, fields: dict[str, Any]) -> None:
    parts = list(client.chat(**fields, stream=True))
    expect([part.done for part in parts] == [False] * (len(parts) - 1) + [True], "not ended once")
    counted(parts[-1], fields)
    counted_logprobs([part for part in parts if part.logprobs], fields)


def generate(client: ollama.Client, fields: dict[str, Any]) -> None:
    reply = client.generate(**fields)
    expect(reply.done and reply.response, f"{reply}")
    counted(reply, fields)
    counted_logprobs([reply] if reply.logprobs else [], fields)


def generate_in_stream(client: ollama.Client, fields: dict[str, Any]) -> None:
    parts = list(client.generate(**fields, stream=True))
    expect("".join(part.response for part in parts), "no text")
    counted(parts[-1], fields)


def counted(reply: Any, fields: dict[str, Any]) -> None:
    expect(reply.prompt_eval_count > 0 and reply.eval_count >= 0, f"{reply}")
    expect(reply.done_reason in ("stop", "length"), f"{reply.done_reason}")
    limit = fields["options"].get("num_predict", -1)
    expect(limit < 0 or reply.eval_count <= limit, f"{reply.eval_count} tokens")


def counted_logprobs(parts: list[Any], fields: dict[str, Any]) -> None:
    if not fields.get("logprobs"):
        return
    found = [entry for part in parts for entry in part.logprobs]
    expect(found, "no log probabilities")
    expect(all(len(entry.top_logprobs) == fields["top_logprobs"] for entry in found), f"{found}")


def formatted(client: ollama.Client, fields: dict[str, Any], form: Any) -> None:
    answered(client.chat(**fields, format=form).message.content or "", form)


def formatted_prompt(client: ollama.Client, fields: dict[str, Any], form: Any) -> None:
    answered(client.generate(**fields, format=form).response, form)


def answered(text: str, form: Any) -> None:
    answer = json.loads(text)
    expect(isinstance(answer, dict), text)
    if form == SCHEMA:
        expect(answer["colour"] in ("red", "blue"), text)


def refuse(client: ollama.Client, fields: dict[str, Any], word: str) -> None:
    with refused(ollama.ResponseError, word):
        client.chat(**fields)


def unknown_model(client: ollama.Client) -> None:
    with refused(ollama.ResponseError, "no-such-model"):
        client.chat("no-such-model", ASKED)


if __name__ == "__main__":
    run(cases, "ollama")
