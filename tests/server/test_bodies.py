"""For any wrong body, the reply is one sentence with the right status, quickly and with little
memory.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import APIRoute
from hypothesis import given
from hypothesis import strategies as st
from live_server import Live, live
from pydantic import BaseModel, TypeAdapter, ValidationError

from deepseek.server import schema
from deepseek.server.app import ROUTERS
from deepseek.server.body import Body, Several
from deepseek.server.errors import ApiError, as_api_error, explained, without_paths
from deepseek.server.json_body import MAX_DEPTH, MAX_KEYS, JsonRoute, deeper, parsed
from deepseek.server.schema import ChatRequest, CompletionRequest
from deepseek.server.settings import Settings

CHAT: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "a"}],
    "max_tokens": 1,
}
KIND = {"Content-Type": "application/json"}
POSTS = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/embeddings",
    "/v1/experts",
    "/v1/experts/arm",
    "/v1/teach",
    "/v1/preferences",
    "/v1/preferences/1",
]

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def open_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server without keys, with teaching enabled."""
    folder = tmp_path_factory.mktemp("bodies")
    (folder / "root").mkdir()
    with live(folder, Settings(teach_root=folder / "root")) as running:
        yield running


def error_of(server: Live, path: str, body: bytes | str, status: int = 400) -> dict[str, Any]:
    """Return the error in the reply to a body."""
    with server.http() as http:
        reply = http.post(path, content=body, headers=KIND)
    assert reply.status_code == status, reply.text
    error: dict[str, Any] = reply.json()["error"]
    assert error["message"].endswith(".")
    return error


# --- JSON itself


@given(VALUES)
def test_any_json_value_is_read_as_it_was_written(value: Any) -> None:
    assert parsed(json.dumps(value).encode()) == value
    assert parsed(json.dumps(value, ensure_ascii=False).encode()) == value


@given(st.binary(max_size=40))
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    try:
        value = parsed(body)
    except ApiError as error:
        assert (error.status, error.code) == (400, "invalid_json")
    else:
        assert value == json.loads(body)


@given(st.integers(1, 3000), st.sampled_from(["[", '{"a":']))
def test_depth_is_limited_at_one_level(levels: int, opening: str) -> None:
    body = opening * levels + "1" + ("]" if opening == "[" else "}") * levels
    if levels <= MAX_DEPTH:
        assert parsed(body.encode()) == json.loads(body)
    else:
        with pytest.raises(ApiError, match="deep"):
            parsed(body.encode())


def test_depth_counts_lists_and_objects() -> None:
    assert not deeper([{"a": [1]}], 3)
    assert deeper([{"a": [1]}], 2)
    assert not deeper(1, 0)


REFUSED = {
    "nothing": b"",
    "UTF-16": json.dumps(CHAT).encode("utf-16"),
    "Latin-1": b'{"model": "\xff"}',
    "gzip": b"\x1f\x8b\x08\x00",
    "half of a pair": b'{"model": "\\ud800"}',
    "a key that is half of a pair": b'{"\\udfff": 1}',
    "NaN": b'{"temperature": NaN}',
    "beyond a float": b'{"temperature": 1e999}',
    "infinity": b'{"temperature": -Infinity}',
    "many digits": b'{"seed": ' + b"9" * 5000 + b"}",
    "a key twice": b'{"model": "a", "model": "b"}',
    "an inner key twice": b'{"a": [{"b": 1, "b": 1}]}',
    "many keys": json.dumps({str(number): 1 for number in range(MAX_KEYS + 1)}).encode(),
    "cut": b'{"model": "tiny"',
    "more behind": b"{} {}",
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_body_that_is_no_strict_json_is_refused(open_server: Live, name: str) -> None:
    for path in POSTS:
        assert error_of(open_server, path, REFUSED[name])["code"] == "invalid_json"


@pytest.mark.parametrize(
    "kind", ["", "text/plain", "application/x-www-form-urlencoded", "application/xml", "json"]
)
def test_another_media_type_is_refused(open_server: Live, kind: str) -> None:
    with open_server.http() as http:
        for path in POSTS:
            reply = http.post(path, content=json.dumps(CHAT), headers={"Content-Type": kind})
            assert (reply.status_code, reply.json()["error"]["code"]) == (
                415,
                "unsupported_media_type",
            )


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON"])
def test_json_by_its_other_names_is_read(open_server: Live, kind: str) -> None:
    with open_server.http() as http:
        reply = http.post(
            "/v1/chat/completions", content=json.dumps(CHAT), headers={"Content-Type": kind}
        )
        assert reply.status_code == 200


def test_every_route_with_a_body_reads_it_strictly() -> None:
    routes = [route for module in ROUTERS for route in module.router.routes]
    with_body = [
        route for route in routes if isinstance(route, APIRoute) and route.body_field is not None
    ]
    assert {route.path for route in with_body} >= {"/v1/teach", "/v1/completions"}
    assert [route.path for route in with_body if not isinstance(route, JsonRoute)] == []


# --- Invalid fields


def models_of(annotation: Any) -> list[type[BaseModel]]:
    """Return all request bodies that a module declares."""
    return [
        value
        for value in vars(annotation).values()
        if isinstance(value, type) and issubclass(value, Body) and value is not Body
    ]


def lists_in(core: Any) -> Iterator[dict[str, Any]]:
    """Yield the list schemas in a Pydantic core schema."""
    if isinstance(core, dict):
        if core.get("type") == "list":
            yield core
        for part in core.values():
            yield from lists_in(part)
    elif isinstance(core, list | tuple):
        for part in core:
            yield from lists_in(part)


@pytest.mark.parametrize("model", models_of(schema), ids=lambda model: model.__name__)
def test_a_list_reports_its_first_mistake_only(model: type[BaseModel]) -> None:
    """A body of 4 MiB can hold a million; reporting all took 46 s and 7 GB."""
    assert all(one.get("fail_fast") for one in lists_in(model.__pydantic_core_schema__))


@pytest.mark.parametrize(
    ("path", "start", "item", "end"),
    [
        ("/v1/completions", '{"model": "tiny", "prompt": [', "{}", "]}"),
        ("/v1/embeddings", '{"model": "tiny", "input": [', "{}", "]}"),
        ("/v1/experts/arm", '{"arm": [', "0", "]}"),
        (
            "/v1/chat/completions",
            '{"model": "tiny", "messages": [{"role": "user", "content": [',
            "0",
            "]}]}",
        ),
        ("/v1/chat/completions", '{"model": "tiny", "stop": [', "[]", "]}"),
    ],
)
def test_a_body_full_of_mistakes_is_refused_soon(
    open_server: Live, path: str, start: str, item: str, end: str
) -> None:
    body = start + ",".join([item] * (1_000_000 // len(item))) + end
    began = time.process_time()
    error = error_of(open_server, path, body)
    assert time.process_time() - began < 6  # including the test's own part; it was 46
    assert error["param"].endswith(".0")


def mistake(model: type[BaseModel], body: Any) -> ApiError:
    """Return the error for an invalid body."""
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    errors: list[Any] = caught.value.errors()
    return explained([{**error, "loc": ("body", *error["loc"])} for error in errors], body)


MESSAGE = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("model", "body", "param", "words"),
    [
        (ChatRequest, {**CHAT, "stop": 5}, "stop", "a text or a list"),
        (ChatRequest, {**CHAT, "stop": ["a", 5]}, "stop.1", "a text"),
        (ChatRequest, {**CHAT, "tool_choice": "x"}, "tool_choice", "'required' or an object"),
        (ChatRequest, {**CHAT, "tool_choice": {}}, "tool_choice.type", "missing"),
        (ChatRequest, {**CHAT, "retrieve": []}, "retrieve", "true or false or a whole number"),
        (ChatRequest, {**CHAT, "n": "1"}, "n", "a whole number"),
        (ChatRequest, {**CHAT, "nonsense": 1}, "nonsense", "not supported"),
        (ChatRequest, {"model": "tiny"}, "messages", "missing"),
        (ChatRequest, {**CHAT, "messages": []}, "messages", "1 or more items"),
        (
            ChatRequest,
            {**CHAT, "experts": {"arm": 5}},
            "experts.arm",
            "a list or an object or 'auto'",
        ),
        (ChatRequest, {**CHAT, "experts": {"deny": ["none"]}}, "experts.deny.0", "reserved"),
        (
            ChatRequest,
            {**CHAT, "messages": [MESSAGE, {"role": "user", "content": [{"type": "text"}]}]},
            "messages.1.content.0.text",
            "missing",
        ),
        (  # the type of a part can be the name of one of its keys
            ChatRequest,
            {
                **CHAT,
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "a", "cache": 1}]}
                ],
            },
            "messages.0.content.0.cache",
            "not supported",
        ),
        (
            ChatRequest,
            {**CHAT, "messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
            "messages.0.content.0.text",
            "a text",
        ),
        (
            ChatRequest,
            {**CHAT, "tools": [{"type": "function", "function": {"name": "f", "parameters": 5}}]},
            "tools.0.function.parameters",
            "an object",
        ),
        (
            ChatRequest,
            {**CHAT, "messages": [MESSAGE, {"role": "tool", "content": "a"}]},
            "messages.1",
            "needs tool_call_id",
        ),
        (ChatRequest, {**CHAT, "messages": [{"role": "user"}]}, "messages.0", "needs content"),
        (
            ChatRequest,
            {**CHAT, "messages": [{"role": "system", "content": None}]},
            "messages.0",
            "needs content",
        ),
        (ChatRequest, {**CHAT, "tools": [{"type": "mcp"}]}, "tools.0.type", "run on the server"),
        (ChatRequest, {**CHAT, "max_tokens": 0}, "max_tokens", "should be -1 or at least 1."),
        (ChatRequest, {**CHAT, "retrieve": 17}, "retrieve", "it should be at most 16."),
        (ChatRequest, {**CHAT, "retrieve": "../a"}, "retrieve", "it should be at most 64 letters"),
        (ChatRequest, {**CHAT, "stop": ["a"] * 99}, "stop", "or fewer items."),
        (CompletionRequest, {"model": "tiny", "prompt": [1, "a"]}, "prompt.1", "a whole number"),
        (CompletionRequest, {"model": "tiny", "prompt": None}, "prompt", "a text or a list"),
        (CompletionRequest, [], "", "an object"),
    ],
)
def test_a_mistake_is_told_by_field_and_meaning(
    model: type[BaseModel], body: Any, param: str, words: str
) -> None:
    error = mistake(model, body)
    assert (error.param or "") == param
    assert words in error.message


@given(
    st.sampled_from(models_of(schema)),
    st.dictionaries(st.sampled_from(["model", "messages", "prompt", "input", "stop", "arm", "name",
                                     "experts", "tool_choice", "retrieve", "kind", "choice"]), VALUES),
)  # fmt: skip
def test_no_message_names_a_branch_of_a_union(model: type[BaseModel], body: dict[str, Any]) -> None:
    try:
        model.model_validate(body)
    except ValidationError as caught:
        error = mistake(model, body)
        parts = {str(part) for one in caught.errors() for part in one["loc"]}
        branches = {part for part in parts if "[" in part or part.startswith("constrained")}
        assert not any(branch in error.message for branch in branches)
        at: Any = body
        for part in (error.param or "").split(".")[:-1]:  # the path exists in the body
            at = at[int(part)] if isinstance(at, list) else at.get(part, {})


@pytest.mark.parametrize("name", ["all", "auto", "none"])
def test_reserved_names_are_refused_at_once(open_server: Live, name: str) -> None:
    lesson = {"name": name, "kind": "folder", "path": "missing"}
    for path, body in (("/v1/teach", lesson), ("/v1/experts", {"name": name})):
        error = error_of(open_server, path, json.dumps(body))
        assert (error["param"], "reserved" in error["message"]) == ("name", True)


def test_a_list_of_any_type_can_be_declared() -> None:
    assert TypeAdapter(Several[int]).validate_python([1, 2]) == [1, 2]


# --- Paths


def test_a_message_shows_no_folder_of_the_server(tmp_path: Path) -> None:
    file = tmp_path / "a.db"
    assert without_paths(f"{file} cannot be read; see {file}.") == "a.db cannot be read; see a.db."
    assert without_paths(f"'{tmp_path}/'") == f"'{tmp_path.name}'"
    kept = "POST /v1/models; Pointer '/$defs/x' is missing; 3/4; https://host/tmp/x."
    assert without_paths(kept) == kept


@given(st.lists(st.text(st.sampled_from("abc.-_"), min_size=1, max_size=5), min_size=1, max_size=4))
def test_no_message_shows_more_than_the_last_name_of_a_path(parts: list[str]) -> None:
    told = ApiError(500, f"It is /tmp/{'/'.join(parts)} there.").message
    assert "/" not in told


@pytest.mark.parametrize("status", [404, 405])
def test_what_is_not_there_has_the_body_of_errors(open_server: Live, status: int) -> None:
    with open_server.http() as http:
        reply = http.get("/v1/nothing") if status == 404 else http.put("/v1/models")
    assert reply.status_code == status
    assert reply.json()["error"].keys() == {"message", "type", "param", "code"}


def test_a_missing_preference_is_404(open_server: Live) -> None:
    told = error_of(open_server, "/v1/preferences/12345", '{"choice": 0}', 404)
    assert "12345" not in told["message"]
    assert str(open_server.folder.parent) not in told["message"]


def test_a_mistake_in_the_path_is_told_by_its_name(open_server: Live) -> None:
    with open_server.http() as http:
        reply = http.post("/v1/preferences/abc", json={"choice": 0})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "number")


def test_what_has_no_equivalent_in_our_requests_is_no_failure_of_the_server() -> None:
    with pytest.raises(ValidationError) as error:
        ChatRequest(model="tiny", messages=[])
    refusal = as_api_error(error.value)
    assert (refusal.status, refusal.param) == (400, "messages")


def test_parts_without_nulls_are_taken_as_they_are() -> None:
    """A body can have a hundred thousand parts, and is validated in the event loop."""
    part = {"type": "text", "text": "a"}
    assert schema.TextPart._without_nulls(part) is part
    assert schema.TextPart._without_nulls({**part, "prompt_cache_breakpoint": None}) == part
