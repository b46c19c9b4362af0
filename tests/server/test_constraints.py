"""Answers constrained by schemas, regular expressions, choices and grammars, under all names that
clients use for them.
"""

import json
import re
import time
from typing import Any

import pytest
from live_server import Live

from deepseek.engine.grammar import MAX_CHARACTERS
from deepseek.engine.request import Grammar, GrammarCompilerError
from deepseek.engine.vocabulary import Matcher
from deepseek.errors import ConfigError
from deepseek.server import constraints
from deepseek.server.constraints import ConstraintFields, JsonSchema, ResponseFormat
from deepseek.server.errors import ApiError

ASKED = [{"role": "user", "content": "the value of the model"}]
GBNF = 'root ::= "y" ("es" | "ou")'
LARK = 'start: "yes" | "you"'
SCHEMA = {"enum": ["yes", "you"]}
UNTYPED = {"type": "foo"}
NESTED = '{"not": ' * 101 + "{}" + "}" * 101
PLAIN: list[dict[str, Any]] = [
    {"response_format": {"type": "regex", "pattern": "yes|you"}},
    {"response_format": {"type": "grammar", "grammar": GBNF}},
    {"response_format": {"type": "grammar", "grammar": LARK}},
    {"structured_outputs": {"regex": "^(yes|you)$"}},
    {"structured_outputs": {"choice": ["yes", "you"]}},
    {"structured_outputs": {"grammar": GBNF}},
    {"guided_regex": "yes|you"},
    {"guided_choice": ["yes", "you"]},
    {"guided_grammar": GBNF},
    {"grammar": GBNF},
]
JSON: list[dict[str, Any]] = [
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}},
    {"response_format": {"type": "json_schema", "schema": SCHEMA}},
    {"response_format": {"type": "json_object", "schema": SCHEMA}},
    {"structured_outputs": {"json": SCHEMA}},
    {"guided_json": SCHEMA},
    {"guided_json": '{"enum": ["yes", "you"]}'},
    {"json_schema": SCHEMA},
]


def answer(server: Live, fields: dict[str, Any], path: str, text: dict[str, Any]) -> str:
    body = {"model": "tiny", "max_tokens": 40, "temperature": 1, **text, **fields}
    with server.http() as http:
        reply = http.post(path, json=body)
    assert reply.status_code == 200, reply.text
    choice = reply.json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("number", range(len(PLAIN + JSON)))
def test_the_answer_follows(server: Live, path: str, number: int) -> None:
    fields = (PLAIN + JSON)[number]
    text = {"messages": ASKED} if "chat" in path else {"prompt": "the value"}
    pattern = "yes|you" if number < len(PLAIN) else '"(yes|you)"'
    assert re.fullmatch(pattern, answer(server, fields, path, text))


@pytest.mark.parametrize("field", [{"grammar": GBNF}, {"grammar": LARK}])
def test_llama_cpp_s_route(server: Live, field: dict[str, Any]) -> None:
    with server.http() as http:
        reply = http.post("/completion", json={"prompt": "the", "n_predict": 30, **field})
    assert reply.json()["content"] in ("yes", "you")


def test_ollama_continues_a_raw_text_in_a_format(server: Live) -> None:
    body = {"model": "tiny", "prompt": "the", "raw": True, "stream": False, "format": SCHEMA}
    with server.http() as http:
        assert http.post("/api/generate", json=body).json()["response"] in ('"yes"', '"you"')


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"grammar": GBNF, "guided_regex": "a"}, "grammar and guided_regex constrain the same"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "constrain the same"),
        ({"response_format": {"type": "regex"}}, "response_format.pattern is missing"),
        ({"response_format": {"type": "grammar"}}, "response_format.grammar is missing"),
        ({"guided_json": "no JSON"}, "The JSON schema is not valid JSON (line 1, column 1)"),
        ({"guided_json": "[1]"}, "not the text of a JSON object"),
        ({"guided_json": NESTED}, "The JSON schema nests more than 100 levels deep"),
        ({"guided_json": '{"type": "null", "type": "array"}'}, "has the key 'type' twice"),
        ({"grammar": "root ::= x"}, "no rule"),
        ({"guided_regex": "(a"}, "regular expression cannot be used"),
        ({"guided_regex": r"(a)\1"}, "regular expression cannot be used"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structural_tag is not supported"),
    ],
)
def test_what_cannot_be_followed_is_refused(
    server: Live, fields: dict[str, Any], words: str
) -> None:
    with server.http() as http:
        reply = http.post(
            "/v1/chat/completions", json={"model": "tiny", "messages": ASKED, **fields}
        )
    assert reply.status_code == 400
    assert words in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": {"type": "regex"}}, "response_format.pattern"),
        ({"structured_outputs": {"json": "[]"}}, "structured_outputs.json"),
        ({"guided_json": "[]"}, "guided_json"),
        ({"guided_json": NESTED}, "guided_json"),
        ({"response_format": {"type": "regex", "pattern": "("}}, "response_format"),
        ({"response_format": {"type": "json_object", "schema": UNTYPED}}, "response_format"),
        ({"structured_outputs": {"json": UNTYPED}}, "structured_outputs.json"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_regex": "x" * (MAX_CHARACTERS["regex"] + 1)}, "guided_regex"),
        ({"grammar": "root ::= x"}, "grammar"),
        ({"grammar": "start: ("}, "grammar"),
        ({"grammar": "x" * (MAX_CHARACTERS["gbnf"] + 1)}, "grammar"),
        ({"json_schema": UNTYPED}, "json_schema"),
        ({"logit_bias": {"999999999": 1}}, "logit_bias"),
    ],
)
def test_a_refusal_names_the_field_as_openai_does(
    server: Live, fields: dict[str, Any], param: str
) -> None:
    body = {"model": "tiny", "messages": ASKED, **fields}
    with server.http() as http:
        reply = http.post("/v1/chat/completions", json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("wanted", "param"),
    [
        ({"type": "json_schema", "name": "a"}, "text.format.schema"),
        ({"type": "json_schema", "name": "a", "schema": UNTYPED}, "text.format"),
    ],
)
def test_a_refused_response_names_its_own_field(
    server: Live, wanted: dict[str, Any], param: str
) -> None:
    body = {"model": "tiny", "input": "Hello", "text": {"format": wanted}}
    with server.http() as http:
        reply = http.post("/v1/responses", json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


def test_the_reason_why_a_regular_expression_fails_is_in_one_line(server: Live) -> None:
    body = {"model": "tiny", "prompt": "a", "guided_regex": "("}
    with server.http() as http:
        error = http.post("/v1/completions", json=body).json()["error"]
    assert error["message"] == (
        'The regular expression cannot be used (invalid regex "(" (in regex): unclosed group); '
        "correct it."
    )
    assert error["param"] == "guided_regex"


def test_a_server_that_cannot_compile_grammars_blames_no_field() -> None:
    def fail(_: Grammar) -> None:
        raise GrammarCompilerError("The process does not start.")

    with pytest.raises(GrammarCompilerError):
        ConstraintFields(guided_regex="a").constraint(fail)


def test_the_empty_schema_is_any_json() -> None:
    described = JsonSchema.model_validate({"name": "a", "schema": {}})
    grammar = ResponseFormat(type="json_schema", json_schema=described).constraint()
    assert grammar is not None and json.loads(grammar.text) == {}


LONG = "x" * MAX_CHARACTERS["json_schema"]


@pytest.mark.parametrize(
    "fields",
    [
        {"json_schema": {"title": LONG}},
        {"guided_json": {"title": LONG}},
        {"guided_json": f'{{"title": "{LONG}"}}'},
        {"structured_outputs": {"json": f'{{"title": "{LONG}"}}'}},
        {"response_format": {"type": "json_object", "schema": {"title": LONG}}},
        {"guided_choice": [LONG]},
        {"guided_grammar": LONG},
    ],
)
def test_what_is_too_long_is_refused_before_any_work_on_it(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise AssertionError("it was worked on")

    for name in ("closed", "parsed", "_literal"):
        monkeypatch.setattr(constraints, name, fail)
    monkeypatch.setattr(constraints, "LARK", None)
    with pytest.raises(ApiError, match="longer than"):
        constraints.ConstraintFields.model_validate(fields).constraint()


def test_blank_lines_of_a_grammar_are_passed_over_once() -> None:
    """Scanning from each blank line to the end of all took seconds."""
    started = time.thread_time()
    blank = "\n" * (MAX_CHARACTERS["gbnf"] - 20)
    kinds = [constraints.grammar_of(blank + rule).kind for rule in (' root ::= "a"', ' start: "a"')]
    assert kinds == ["gbnf", "lark"]
    assert time.thread_time() - started < 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_grammar_that_becomes_too_complex_is_the_request_s_mistake(
    server: Live, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    def fail(_: Matcher) -> Any:
        raise ConfigError("The grammar has become too complex; simplify it.")

    monkeypatch.setattr(Matcher, "allowed", fail)
    body = {"model": "tiny", "prompt": "the", "max_tokens": 40, "grammar": GBNF, "stream": stream}
    with server.http() as http:
        reply = http.post("/v1/completions", json=body)
    assert reply.status_code == 400  # nothing of the stream has been sent
    assert "too complex" in reply.json()["error"]["message"]
