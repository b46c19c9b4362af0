"""Fuzz targets of the server: request bodies, constraints on answers, paths of text to teach, and
stored prompts.
"""

import asyncio
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pygit2
from fuzz.mutate import deep, mutated_bytes, mutated_text, mutated_value
from fuzz.target import Fuzzer, as_json, lossless
from hypothesis import strategies as st
from tiny_expert import save_expert
from tiny_model import tiny_model

from deepseek.engine.engine import Engine
from deepseek.errors import UserError
from deepseek.packs.library import prompts_file
from deepseek.server.app import create_app
from deepseek.server.errors import ApiError
from deepseek.server.routes.teach import Teacher
from deepseek.server.settings import Settings

Send = Callable[[str, str, bytes], httpx.Response]
Seeds = list[tuple[str, Any]]

TURNS = [{"role": "user", "content": "hello"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CHAT = {
    "model": "tiny",
    "messages": TURNS,
    "max_tokens": 1,
    "temperature": 0.5,
    "stop": ["x"],
    "logit_bias": {"5": 1.0},
    "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}},
    "tools": [TOOL],
    "experts": {"arm": "auto", "deny": []},
}
TEXT = {"model": "tiny", "prompt": "ab", "max_tokens": 1}

BODIES: Seeds = [
    ("/v1/chat/completions", CHAT),
    ("/v1/completions", {**TEXT, "echo": True}),
    ("/v1/embeddings", {"model": "tiny", "input": ["ab", "c"]}),
    (
        "/v1/responses",
        {
            "model": "tiny",
            "input": [{"role": "user", "content": "hi"}],
            "max_output_tokens": 1,
            "text": {"format": {"type": "text"}},
        },
    ),
    ("/v1/experts", {"name": "one"}),
    ("/v1/experts/arm", {"arm": ["one"]}),
    ("/v1/teach", {"name": "one", "kind": "folder", "path": "."}),
    (
        "/v1/preferences",
        {"prompt": [{"role": "user", "content": "q"}], "chosen": "a", "rejected": "b"},
    ),
]

CALL = {"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}}
RESULT = {"type": "tool_result", "tool_use_id": "c", "content": [{"type": "text", "text": "r"}]}
ANTHROPIC = {
    "model": "tiny",
    "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}],
    "messages": [
        *TURNS,
        {"role": "assistant", "content": [CALL]},
        {"role": "user", "content": [RESULT, {"type": "text", "text": "b"}]},
    ],
    "tools": [{"name": "f", "input_schema": {"type": "object"}}],
    "tool_choice": {"type": "auto"},
}
OPTIONS = {"num_predict": 1, "temperature": 0.5, "stop": ["x"], "seed": 3, "num_ctx": 64}
OLLAMA_CALL = {"function": {"name": "f", "arguments": {"a": 1}}}
NATIVE = {"prompt": "ab", "n_predict": 1, "stop": ["x"], "top_k": 4, "grammar": 'root ::= "a"'}
GAP = {
    "input_prefix": "a\n",
    "input_suffix": "b\n",
    "prompt": "c",
    "n_predict": 1,
    "n_indent": 1,
    "t_max_predict_ms": 9,
    "input_extra": [{"text": "d", "filename": "e.py", "time": [1, 2]}],
    "response_fields": ["content", "timings/prompt_n"],
}

DIALECTS: Seeds = [
    ("/v1/messages", {**ANTHROPIC, "max_tokens": 1, "stop_sequences": ["x"]}),
    ("/v1/messages/count_tokens", ANTHROPIC),
    (
        "/api/chat",
        {
            "model": "tiny:latest",
            "messages": [*TURNS, {"role": "assistant", "tool_calls": [OLLAMA_CALL]}],
            "tools": [TOOL],
            "format": {"type": "object"},
            "options": OPTIONS,
        },
    ),
    ("/api/generate", {"model": "tiny", "prompt": "ab", "raw": True, "options": OPTIONS}),
    ("/api/embed", {"model": "tiny", "input": ["ab", "c"], "dimensions": 2}),
    ("/api/embeddings", {"model": "tiny", "prompt": "ab"}),
    ("/api/generate", {"model": "tiny", "prompt": "ab", "suffix": "c", "logprobs": True}),
    ("/api/show", {"name": "tiny", "verbose": True}),
    ("/completion", NATIVE),
    ("/infill", GAP),
    ("/tokenize", {"content": "ab", "messages": TURNS, "with_pieces": True}),
    ("/detokenize", {"tokens": [5, 6]}),
    ("/apply-template", {"messages": TURNS, "chat_template_kwargs": {"a": 1}}),
    ("/v1/completions", {**TEXT, "suffix": "c"}),
]

SCHEMA = {"type": "object", "properties": {"a": {"enum": ["b", 1]}}, "required": ["a"]}
SELF = {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
CONSTRAINTS: list[dict[str, Any]] = [
    {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
    {"response_format": {"type": "regex", "pattern": "a+"}},
    {"structured_outputs": {"json": SCHEMA}},
    {"structured_outputs": {"regex": "[a-c]{2,3}"}},
    {"structured_outputs": {"choice": ["yes", "no"]}},
    {"guided_json": as_json(SCHEMA)},
    {"guided_grammar": "start: /a+/"},
    {"json_schema": SCHEMA},
    {"grammar": 'root ::= ("a" | b)*\nb ::= [0-9]+'},
]
TEXT_CONSTRAINTS = {
    "guided_regex": ["(a|b)*c?", "[^a-z]{1,4}\\d", "^x$"],
    "grammar": ['root ::= ("a" | b)*\nb ::= [0-9]+', "start: A | b\nA: /x+/\nb: A start"],
}
GRAMMAR_WORDS = ("(", ")", "[", "]", "{9999}", "{0,}", "*", "+", "?", "|", "\\", "::=", ": ", "^")
GRAMMAR_WORDS += ("(?<=a)", "(?P<n>", "\\p{L}", "\\u{110000}", "\n", '"', "/", "#", "%ignore ", "~")


def sender(folder: Path, stack: ExitStack, engine: Engine | None = None) -> Send:
    """Return a function that sends a body to a server in this process and returns its reply."""
    if engine is None:
        engine = stack.enter_context(Engine(*tiny_model(), max_waiting=64))
    app = create_app(
        engine,
        Settings(
            model="tiny", preferences=folder / "prefs.db", experts_folder=folder, max_body=1 << 20
        ),
    )

    async def request(method: str, path: str, content: bytes) -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            headers = {"Content-Type": "application/json"} if content else {}
            return await client.request(method, path, content=content, headers=headers, timeout=60)

    def send(method: str, path: str, content: bytes) -> httpx.Response:
        reply = asyncio.run(request(method, path, content))
        assert reply.status_code < 500, f"{reply.status_code}: {reply.text[:300]}"
        if reply.status_code >= 400:
            error = reply.json()["error"]
            raise UserError(error if isinstance(error, str) else error["message"])
        return reply

    # Compiles the kernels for one and for several tokens, so that no case is charged for it.
    send("POST", "/v1/completions", as_json({**TEXT, "echo": True, "max_tokens": 3}).encode())
    return send


def posts(send: Send, cases: st.SearchStrategy[tuple[str, bytes]]) -> Fuzzer:
    """Return a target that posts bodies."""
    return Fuzzer(cases, lambda case: send("POST", *case))


def changed_bodies(seeds: Seeds) -> st.SearchStrategy[tuple[str, bytes]]:
    """Return a route and a mutated body for it."""

    def one(route: str, seed: Any) -> st.SearchStrategy[tuple[str, bytes]]:
        changed = mutated_value(seed, {**seed, "response_format": SELF}).map(as_json).map(lossless)
        texts = st.one_of(changed, mutated_bytes(as_json(seed).encode()))
        nested = st.sampled_from([deep("[", "]").encode(), deep('{"a":', "}").encode()])
        return st.tuples(st.just(route), st.one_of(texts, texts, texts, nested))

    return st.one_of([one(route, seed) for route, seed in seeds])


def bodies(folder: Path, stack: ExitStack) -> Fuzzer:
    """Request bodies in OpenAI's layout and our own."""
    return posts(sender(folder, stack), changed_bodies(BODIES))


def dialects(folder: Path, stack: ExitStack) -> Fuzzer:
    """Request bodies in the layouts of Anthropic, Ollama and llama.cpp; infilling."""
    return posts(sender(folder, stack), changed_bodies(DIALECTS))


def constraints(folder: Path, stack: ExitStack) -> Fuzzer:
    """JSON schemas, regular expressions, choices and grammars that an answer has to follow."""

    def body(fields: Any) -> bytes:
        return lossless(as_json({**TEXT, **fields} if isinstance(fields, dict) else fields))

    def texts(field: str, seeds: list[str]) -> st.SearchStrategy[bytes]:
        changed = mutated_text(*seeds, words=GRAMMAR_WORDS)
        return changed.map(lambda text: body({field: text}))

    cases = [mutated_value(*CONSTRAINTS).map(body)]
    cases += [texts(field, seeds) for field, seeds in TEXT_CONSTRAINTS.items()]
    cases += [
        st.sampled_from([deep("(", ")"), deep("a|(", ")")]).map(lambda t: body({"guided_regex": t}))
    ]
    return posts(sender(folder, stack), st.tuples(st.just("/v1/completions"), st.one_of(cases)))


PATH_WORDS = (
    "..",
    "/",
    "./",
    "notes",
    "loop",
    "out",
    "\0",
    "\udc80",
    "x" * 300,
    "~",
    "\\",
    "a/" * 900,
)


def teach(folder: Path, stack: ExitStack) -> Fuzzer:
    """Paths of text to teach and of folders to list, in a folder with links that lead outside."""
    root = folder / "root"
    for name in ("notes", "caf\u00e9"):
        (root / name).mkdir(parents=True)
        (root / name / "a.txt").write_text("text")
    (root / "out").symlink_to(folder)
    (root / "loop").symlink_to(root / "loop")
    pygit2.init_repository(root / "sound")
    pygit2.init_repository(root / "pointed")
    own = root / "pointed" / ".git"
    own.rename(folder / "elsewhere")
    own.write_text(f"gitdir: {folder / 'elsewhere'}\n")
    engine = stack.enter_context(Engine(*tiny_model()))
    app = create_app(engine, Settings(model="tiny", experts_folder=folder, teach_root=root))
    teacher = Teacher(app.state.service)

    def run(case: tuple[str, bool]) -> None:
        try:
            text = teacher.text(case[0], is_repository=case[1])
        except ApiError as error:
            assert error.status < 500 and str(folder) not in error.message
            raise UserError(error.message) from None
        assert text.resolve().is_relative_to(root.resolve())
        assert text.name != "pointed" or not case[1]

    seeds = ("notes", "caf\u00e9/a.txt", "sound", "pointed", "out/root", "loop", ".")
    return Fuzzer(st.tuples(mutated_text(*seeds, words=PATH_WORDS), st.booleans()), run)


def prompts(folder: Path, stack: ExitStack) -> Fuzzer:
    """Prompts of an expert, stored beside its pack."""
    model = tiny_model()
    engine = stack.enter_context(Engine(*model, max_waiting=64))
    digest = engine.plug(save_expert(model, "one", folder)).digest
    send = sender(folder, stack, engine)
    seed = {"digest": digest, "prompts": [{"kind": "chat", "text": "Where is it?"}]}
    file = prompts_file("one", folder)

    def run(data: bytes) -> None:
        file.write_bytes(data)
        if not send("GET", "/v1/experts/one/prompts", b"").json()["prompts"]:
            raise UserError("The stored prompts are left out.")

    cases = st.one_of(
        mutated_value(seed).map(as_json).map(lossless), mutated_bytes(json.dumps(seed).encode())
    )
    return Fuzzer(cases, run)
