"""Requests of Continue and Open WebUI, replayed as their source code sends them.

Continue uses its providers `openai`, `ollama` and `llama.cpp`; Open WebUI uses an OpenAI and an
Ollama connection as a proxy, and requests from the browser, with a CORS preflight.
"""

import json
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import httpx
from cases import Case, Target, expect, run

PAGE = "http://127.0.0.1:3000"
"""Origin that the benchmark's server allows (`--allow-origin`)."""

ASKED: list[Any] = [{"role": "user", "content": "Name a colour and say why you like it."}]
RULES = {"role": "system", "content": "<important_rules>Write code in fences.</important_rules>"}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "read_file",
        "description": "Reads a file.",
        "parameters": {
            "type": "object",
            "required": ["filepath"],
            "properties": {"filepath": {"type": "string", "description": "its path"}},
        },
    },
}
CALL = {"id": "call_1", "type": "function", "function": {"name": "read_file", "arguments": "{}"}}
CALLED: list[Any] = [
    *ASKED,
    {"role": "assistant", "content": " ", "tool_calls": [CALL]},
    {"role": "tool", "content": "text", "tool_call_id": "call_1"},
]
FIM_STOPS = [
    "<fim_prefix>",
    "<fim_suffix>",
    "<fim_middle>",
    "<file_sep>",
    "<|endoftext|>",
    "</fim_middle>",
    "</code>",
    "/src/",
    "#- coding: utf-8",
    "```",
    "\n\n",
]
FIM = "<fim_prefix>def add(a, b):\n    <fim_suffix>\n<fim_middle>"
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}

CONTINUE_HEADERS = {"Authorization": "Bearer none", "api-key": "none", "x-api-key": "none"}
WEBUI_HEADERS = {
    "Authorization": "Bearer none",
    "X-OpenWebUI-User-Name": "Ann",
    "X-OpenWebUI-User-Id": "1",
    "X-OpenWebUI-User-Email": "ann@example.org",
    "X-OpenWebUI-User-Role": "user",
    "X-OpenWebUI-Chat-Id": "c-1",
}

Layout = Literal["object", "events", "lines"]
Replay = tuple[str, Layout, dict[str, Any] | None]
"""Path, layout of the reply, and body without the model's name; None as body means GET."""

OLLAMA_OPTIONS = {"temperature": 0.5, "num_predict": 24, "num_ctx": 4096, "stop": ["</s>"]}

CONTINUE: dict[str, Replay] = {
    "openai: models": ("/v1/models", "object", None),
    "openai: chat": (
        "/v1/chat/completions",
        "events",
        {
            "messages": [RULES, *ASKED],
            "max_tokens": 24,
            "temperature": 0.5,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    ),
    "openai: agent": (
        "/v1/chat/completions",
        "events",
        {
            "messages": CALLED,
            "max_tokens": 24,
            "stream": True,
            "stream_options": {"include_usage": True},
            "tools": [TOOL],
            "parallel_tool_calls": False,
        },
    ),
    "openai: edit with a prediction": (
        "/v1/chat/completions",
        "events",
        {
            "messages": ASKED,
            "max_tokens": 24,
            "stream": True,
            "prediction": {"type": "content", "content": "def add(a, b):"},
        },
    ),
    "openai: autocomplete": (
        "/v1/completions",
        "events",
        {"prompt": FIM, "max_tokens": 24, "temperature": 0.01, "stop": FIM_STOPS, "stream": True},
    ),
    "openai: embeddings": ("/v1/embeddings", "object", {"input": ["def add(a, b):", "text"]}),
    "ollama: models": ("/api/tags", "object", None),
    "ollama: show by name": ("/api/show", "object", {"name": "MODEL"}),
    "ollama: chat": (
        "/api/chat",
        "lines",
        {
            "messages": [RULES, *ASKED],
            "options": OLLAMA_OPTIONS,
            "keep_alive": 1800,
            "stream": True,
        },
    ),
    "ollama: agent": (
        "/api/chat",
        "object",
        {
            "messages": ASKED,
            "options": OLLAMA_OPTIONS,
            "keep_alive": 1800,
            "stream": False,
            "tools": [TOOL],
        },
    ),
    "ollama: autocomplete": (
        "/api/generate",
        "lines",
        {
            "prompt": FIM,
            "raw": True,
            "options": {**OLLAMA_OPTIONS, "stop": FIM_STOPS},
            "keep_alive": 1800,
            "stream": True,
        },
    ),
    "ollama: autocomplete with a suffix": (
        "/api/generate",
        "lines",
        {
            "prompt": "def add(a, b):\n    ",
            "suffix": "\n\nprint(add(1, 2))",
            "options": OLLAMA_OPTIONS,
            "keep_alive": 1800,
            "stream": True,
        },
    ),
    "ollama: embeddings": ("/api/embed", "object", {"input": ["def add(a, b):", "text"]}),
    "llama.cpp: chat": (
        "/completion",
        "events",
        {
            "prompt": "Once upon a time",
            "n_predict": 24,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 40,
            "min_p": 0.05,
            "mirostat": 0,
            "frequency_penalty": 0,
            "presence_penalty": 0,
            "stop": ["</s>"],
            "stream": True,
        },
    ),
}

WEBUI: dict[str, Replay] = {
    "openai: models": ("/v1/models", "object", None),
    "openai: chat": (
        "/v1/chat/completions",
        "events",
        {
            "messages": ASKED,
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0.8,
            "top_p": 0.9,
            "max_tokens": 24,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "seed": 7,
            "stop": ["</s>"],
            "logit_bias": {"10": 1},
            "reasoning_effort": "medium",
        },
    ),
    "openai: chat with tools": (
        "/v1/chat/completions",
        "events",
        {"messages": CALLED, "stream": True, "tools": [TOOL], "max_tokens": 24},
    ),
    "openai: title": (
        "/v1/chat/completions",
        "object",
        {"messages": ASKED, "stream": False, "max_completion_tokens": 1000},
    ),
    "openai: follow-ups": ("/v1/chat/completions", "object", {"messages": ASKED, "stream": False}),
    "openai: embeddings": ("/v1/embeddings", "object", {"input": ["one", "two"]}),
    "ollama: version": ("/api/version", "object", None),
    "ollama: models": ("/api/tags", "object", None),
    "ollama: loaded": ("/api/ps", "object", None),
    "ollama: show": ("/api/show", "object", {"name": "MODEL"}),
    "ollama: chat": (
        "/api/chat",
        "lines",
        {
            "messages": ASKED,
            "stream": True,
            "options": {
                "temperature": 0.8,
                "top_p": 0.9,
                "top_k": 40,
                "min_p": 0.0,
                "seed": 7,
                "repeat_penalty": 1.1,
                "repeat_last_n": 64,
                "tfs_z": 1,
                "num_ctx": 2048,
                "num_batch": 512,
                "num_keep": 24,
                "num_predict": 24,
                "use_mmap": True,
                "use_mlock": False,
                "num_thread": 2,
                "num_gpu": 0,
                "mirostat": 0,
                "mirostat_eta": 0.1,
                "mirostat_tau": 5.0,
            },
            "keep_alive": "5m",
        },
    ),
    "ollama: chat in a format": (
        "/api/chat",
        "object",
        {
            "messages": ASKED,
            "stream": False,
            "format": {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}},
            "options": {"num_predict": 64},
        },
    ),
    "ollama: older embeddings": ("/api/embeddings", "object", {"prompt": "one"}),
    "ollama: embeddings": ("/api/embed", "object", {"input": ["one", "two"], "truncate": True}),
}


def cases(target: Target) -> Iterator[tuple[str, Case]]:
    suites = {"Continue": (CONTINUE, CONTINUE_HEADERS), "Open WebUI": (WEBUI, WEBUI_HEADERS)}
    for program, (replays, headers) in suites.items():
        http = httpx.Client(base_url=target.url, headers=headers, timeout=300)
        for name, replay in replays.items():
            yield f"{program}, {name}", partial(replayed, http, target, replay)
        yield f"{program}, image refused", partial(image, http, target)
        yield f"{program}, client leaves a stream", partial(leaves, http, target)
    yield "Open WebUI, from the browser", partial(from_a_page, target)


def replayed(http: httpx.Client, target: Target, replay: Replay) -> None:
    path, layout, fields = replay
    if fields is None:
        reply = http.get(path)
    elif fields.get("name") == "MODEL":
        reply = http.post(path, json={"name": target.model})
    else:
        reply = http.post(path, json={"model": target.model, **fields})
    expect(reply.status_code == 200, f"HTTP {reply.status_code}: {reply.text}")
    parts = read(reply.text, layout)
    expect(parts and all(isinstance(part, dict) for part in parts), reply.text)
    expect(not any(part.get("error") for part in parts), reply.text)


def read(text: str, layout: Layout) -> list[Any]:
    """Return the JSON objects of a reply."""
    match layout:
        case "object":
            return [json.loads(text)]
        case "lines":
            return [json.loads(line) for line in text.splitlines()]
        case "events":
            data = [line[5:].strip() for line in text.splitlines() if line.startswith("data:")]
            return [json.loads(part) for part in data if part != "[DONE]"]


def image(http: httpx.Client, target: Target) -> None:
    content = [{"type": "text", "text": "Describe it."}, IMAGE]
    body = {"model": target.model, "messages": [{"role": "user", "content": content}]}
    reply = http.post("/v1/chat/completions", json=body)
    expect(reply.status_code == 400, f"HTTP {reply.status_code}")
    expect("images are not supported" in reply.json()["error"]["message"], reply.text)


def leaves(http: httpx.Client, target: Target) -> None:
    body = {"model": target.model, "messages": ASKED, "stream": True}
    with http.stream("POST", "/v1/chat/completions", json=body) as reply:
        next(reply.iter_lines())
    expect(http.get("/ready").status_code == 200, "the server is not ready after it")


def from_a_page(target: Target) -> None:
    asked = {
        "Origin": PAGE,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    path = f"{target.url}/v1/chat/completions"
    allowed = httpx.options(path, headers=asked)
    expect(allowed.headers.get("access-control-allow-origin") == PAGE, f"{allowed.headers}")
    body = {"model": target.model, "messages": ASKED, "max_tokens": 4}
    reply = httpx.post(path, json=body, headers={"Origin": PAGE}, timeout=300)
    expect(reply.status_code == 200, f"HTTP {reply.status_code}")
    expect(reply.headers.get("access-control-allow-origin") == PAGE, f"{reply.headers}")


if __name__ == "__main__":
    run(cases, "httpx")
