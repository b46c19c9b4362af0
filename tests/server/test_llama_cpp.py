"""llama.cpp's own routes."""

import asyncio
import json
from typing import Any

import pytest
from live_server import CONTEXT, Live

from deepseek.server import encoding
from deepseek.server.dialects.llama_cpp import NativeCompletion
from deepseek.server.schema import ChatRequest, CompletionRequest
from deepseek.text.tokenizer import encode_plain

ASKED: list[Any] = [{"role": "user", "content": "the expert of the model"}]


def post(server: Live, path: str, body: dict[str, Any]) -> Any:
    with server.http() as http:
        reply = http.post(path, json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_completion_is_that_of_the_other_route(server: Live) -> None:
    body = {"prompt": "the value", "n_predict": 12, "temperature": 0}
    native = post(server, "/completion", body)
    with server.client() as openai:
        plain = openai.completions.create(
            model="tiny", prompt="the value", temperature=0, max_tokens=12
        )
    assert native["content"] == plain.choices[0].text
    assert native["stop_type"] == "limit"
    assert native["tokens_predicted"] == 12
    assert native["timings"]["predicted_n"] == 12


def test_completion_streams_what_the_whole_reply_says(server: Live) -> None:
    body = {"prompt": "the value", "n_predict": 12, "temperature": 0, "stream": True}
    with server.http() as http:
        lines = [line for line in http.post("/completion", json=body).text.splitlines() if line]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert [chunk["stop"] for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    whole = post(server, "/completion", {**body, "stream": False})
    assert "".join(chunk["content"] for chunk in chunks) == whole["content"]


def test_no_token_that_was_not_asked_for_is_counted(server: Live) -> None:
    reply = post(server, "/completion", {"prompt": "the value", "n_predict": 0})
    assert (reply["content"], reply["tokens_predicted"], reply["experts"]) == ("", 0, {})
    assert reply["timings"]["predicted_n"] == 0
    same = post(server, "/v1/completions", {"model": "tiny", "prompt": "the", "max_tokens": 0})
    assert (same["usage"]["completion_tokens"], same["experts"]) == (0, {})


def test_a_stop_text_is_reported(server: Live) -> None:
    body: dict[str, Any] = {"prompt": "the value", "n_predict": 30, "temperature": 0}
    text = post(server, "/completion", body)["content"]
    stopped = post(server, "/completion", {**body, "stop": [text[4:6]]})
    assert stopped["stop_type"] == "word"
    assert stopped["stopping_word"] == text[4:6]


def test_a_schema_constrains_the_answer(server: Live) -> None:
    schema = {"enum": ["yes", "no"]}
    body = {"prompt": "the value", "n_predict": 30, "json_schema": schema}
    assert json.loads(post(server, "/completion", body)["content"]) in ("yes", "no")


@pytest.mark.parametrize("text", ["the value of the model", "", "漢字 é"])
def test_tokens_round_trip(server: Live, text: str) -> None:
    tokens = post(server, "/tokenize", {"content": text})["tokens"]
    assert tokens == server.engine.tokenizer(text, add_special_tokens=False).input_ids
    assert post(server, "/detokenize", {"tokens": tokens})["content"] == text


def test_pieces_of_tokens(server: Live) -> None:
    reply = post(server, "/tokenize", {"content": "the value", "with_pieces": True})
    assert "".join(token["piece"] for token in reply["tokens"]) == "the value"


def test_pieces_of_characters_are_bytes(server: Live) -> None:
    reply = post(server, "/tokenize", {"content": "a é\ufffd 模", "with_pieces": True})
    pieces = [token["piece"] for token in reply["tokens"]]
    assert [0xC3] in pieces
    whole = b"".join(p.encode() if isinstance(p, str) else bytes(p) for p in pieces)
    assert whole.decode() == "a é\ufffd 模"


def test_control_tokens_are_read_as_text_on_request(server: Live) -> None:
    end = server.engine.tokenizer.eos_token
    assert len(post(server, "/tokenize", {"content": end})["tokens"]) == 1
    plain = post(server, "/tokenize", {"content": end, "parse_special": False})["tokens"]
    assert plain == encode_plain(server.engine.tokenizer, [end])[0]
    assert len(plain) > 1


def test_what_is_longer_than_the_context_is_counted_too(server: Live) -> None:
    """Clients learn from it how much to leave out."""
    text = "the value " * 5000
    reply = post(server, "/tokenize", {"content": text})
    assert reply["count"] == len(reply["tokens"]) > 10 * CONTEXT
    assert post(server, "/detokenize", {"tokens": reply["tokens"]})["content"] == text
    asked = [{"role": "user", "content": text}]
    assert post(server, "/tokenize", {"messages": asked})["count"] > reply["count"]
    body = {"model": "tiny", "messages": asked}
    assert post(server, "/v1/messages/count_tokens", body)["input_tokens"] > reply["count"]
    with server.http() as http:
        refused = http.post("/completion", json={"prompt": text})
    error = refused.json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")


@pytest.mark.parametrize("pieces", [False, True])
def test_a_large_reply_is_encoded_in_parts_and_aside(
    server: Live, pieces: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    aside: list[bool] = []
    parts = encoding.parts

    def recorded(value: Any) -> Any:
        aside.append(asyncio._get_running_loop() is None)
        return parts(value)

    monkeypatch.setattr(encoding, "parts", recorded)
    reply = post(server, "/tokenize", {"content": "the value " * 5000, "with_pieces": pieces})
    assert reply["count"] == len(reply["tokens"])
    assert aside and all(aside)


def test_settings_of_samplers_that_are_off_are_taken(server: Live) -> None:
    body = {"prompt": "the value", "n_predict": 8, "seed": 5, "temperature": 1.0}
    off = {"mirostat": 0, "mirostat_tau": 5.0, "mirostat_eta": 0.1, "dry_multiplier": 0.0}
    off |= {"dry_base": 1.75, "dry_allowed_length": 2, "xtc_probability": 0, "xtc_threshold": 0.1}
    assert (
        post(server, "/completion", body | off)["content"]
        == post(server, "/completion", body)["content"]
    )
    random = body | {"seed": 2**32 - 1, "temperature": 2.0, "n_predict": 24}
    one, other = (post(server, "/completion", random)["content"] for _ in range(2))
    assert one != other


ROUTES: dict[str, dict[str, Any]] = {
    "/completion": {"prompt": "a", "n_predict": 1},
    "/v1/completions": {"model": "tiny", "prompt": "a", "n_predict": 1},
    "/v1/chat/completions": {"model": "tiny", "messages": ASKED, "n_predict": 1},
}
OFF: dict[str, Any] = {
    "cache_prompt": True,
    "dry_multiplier": 0,
    "dynatemp_range": 0.0,
    "lora": [],
    "mirostat": 0,
    "n_cache_reuse": 0,
    "n_indent": 0,
    "n_probs": 0,
    "repeat_last_n": 0,
    "repeat_penalty": 1,
    "response_fields": [],
    "return_tokens": False,
    "t_max_predict_ms": 0,
    "top_n_sigma": -1,
    "typical_p": 1.0,
    "xtc_probability": 0,
}
"""Values that change no answer."""


@pytest.mark.parametrize("route", ROUTES)
def test_values_that_change_nothing_are_taken_on_every_route(server: Live, route: str) -> None:
    reply = post(server, route, ROUTES[route] | OFF)
    written = reply.get("usage", {}).get("completion_tokens", reply.get("tokens_predicted"))
    assert written == 1


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dynatemp_range", 0.5),
        ("lora", [{"id": 0}]),
        ("mirostat", 2),
        ("n_probs", 3),
        ("return_tokens", True),
        ("top_n_sigma", 1.5),
        ("typical_p", 0.5),
    ],
)
def test_samplers_that_are_missing_are_refused_on_every_route(
    server: Live, route: str, field: str, value: Any
) -> None:
    with server.http() as http:
        reply = http.post(route, json={**ROUTES[route], field: value})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, field)


def test_penalties_by_their_names_in_llama_cpp() -> None:
    body: dict[str, Any] = {"model": "tiny", "prompt": "a", "repeat_penalty": 1.5}
    assert CompletionRequest(**body).repetition_penalty == 1.5
    assert CompletionRequest(**body, repetition_penalty=1.2).repetition_penalty == 1.2
    # Not absent, as the model's own generation config could recommend others then.
    off = CompletionRequest(**body, repeat_last_n=0, presence_penalty=1, frequency_penalty=1)
    penalties = (off.repetition_penalty, off.presence_penalty, off.frequency_penalty)
    assert penalties == (1, 0, 0)
    native = NativeCompletion(prompt="a", repeat_penalty=1.5, presence_penalty=1.0)
    request = native.completion("tiny", 8)
    assert (request.repetition_penalty, request.presence_penalty) == (1.5, 1)


def test_a_limit_of_minus_1_is_none() -> None:
    chat: dict[str, Any] = {"model": "tiny", "messages": ASKED}
    assert ChatRequest(**chat, max_tokens=-1).limit is None
    assert ChatRequest(**chat, max_completion_tokens=-1, max_tokens=5).limit == 5
    assert ChatRequest(**chat, n_predict=-1).limit is None
    plain: dict[str, Any] = {"model": "tiny", "prompt": "a"}
    limits = ({}, {"max_tokens": -1}, {"n_predict": -1}, {"n_predict": 7}, {"n_predict": 0})
    found = [CompletionRequest(**plain, **limit).limit(unlimited=512) for limit in limits]
    assert found == [16, 512, 512, 7, 1]


def test_a_stop_text_need_not_be_in_a_list(server: Live) -> None:
    body = {"prompt": "the value", "n_predict": 30, "temperature": 0}
    text = post(server, "/completion", body)["content"]
    listed = post(server, "/completion", {**body, "stop": [text[4:6]]})
    alone = post(server, "/completion", {**body, "stop": text[4:6]})
    assert (alone["content"], alone["stop_type"]) == (listed["content"], "word")


@pytest.mark.parametrize("pairs", [True, False])
def test_the_bias_of_a_token_is_a_number_or_false(server: Live, pairs: bool) -> None:
    body: dict[str, Any] = {"prompt": "the value", "n_predict": 1, "temperature": 0}
    bias = {5: 100, 6: False}
    sent = [list(pair) for pair in bias.items()] if pairs else bias
    reply = post(server, "/completion", {**body, "logit_bias": sent})
    assert reply["content"] == server.engine.tokenizer.decode([5])
    assert reply["generation_settings"]["logit_bias"] == {"5": 100, "6": -100}


def test_a_list_of_one_prompt_is_that_prompt(server: Live) -> None:
    body = {"n_predict": 4, "temperature": 0}
    alone = post(server, "/completion", {**body, "prompt": "the value"})
    listed = post(server, "/completion", {**body, "prompt": ["the value"]})
    assert listed["content"] == alone["content"]
    ids = server.engine.tokenizer("the value").input_ids
    assert post(server, "/completion", {**body, "prompt": [ids]})["content"] == alone["content"]


def test_a_completion_has_the_fields_and_the_end_that_are_asked_for(server: Live) -> None:
    ids = server.engine.tokenizer("\n", add_special_tokens=False).input_ids
    body = {
        "prompt": "the value",
        "n_predict": 20,
        "logit_bias": [[ids[0], 100]],
        "n_indent": 1,
        "response_fields": ["stop_type", "timings/prompt_n"],
    }
    reply = post(server, "/completion", {**body, "grammar": 'root ::= "a\\nb\\n"'})
    assert reply.keys() == set(body["response_fields"])
    whole = post(
        server, "/completion", {**body, "grammar": 'root ::= "a\\nb\\n"', "response_fields": []}
    )
    assert whole["content"] == "a"


def test_a_conversation_is_tokenized_as_chat_does(server: Live) -> None:
    counted = post(server, "/tokenize", {"model": "tiny", "messages": ASKED})
    with server.client() as openai:
        reply = openai.chat.completions.create(model="tiny", messages=ASKED, max_tokens=1)
    assert reply.usage is not None
    assert counted["count"] == reply.usage.prompt_tokens
    assert counted["max_model_len"] == CONTEXT
    rendered = post(server, "/apply-template", {"messages": ASKED})["prompt"]
    assert ASKED[0]["content"] in rendered


def test_props_name_no_path(server: Live) -> None:
    with server.http() as http:
        props = http.get("/props").json()
    assert props["default_generation_settings"]["n_ctx"] == CONTEXT
    assert props["model_path"] == "tiny"


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/completion", {"prompt": "a", "mirostat": 2}, "mirostat"),
        ("/completion", {"prompt": "a", "grammar": "root ::= x"}, "grammar"),
        ("/completion", {"prompt": ["a", "b"]}, "one prompt"),
        ("/completion", {"prompt": [5, "b"]}, "one prompt"),
        ("/completion", {"prompt": "a", "logit_bias": [["b", 1]]}, "id of a token"),
        ("/completion", {"prompt": "a", "logit_bias": {"b": 1}}, "id of a token"),
        ("/completion", {"prompt": "a", "logit_bias": [[5, 101]]}, "100"),
        ("/tokenize", {}, "no text"),
        ("/detokenize", {"tokens": [1 << 30]}, "vocabulary"),
        ("/tokenize", {"content": "the " * 70_000, "with_pieces": True}, "in parts"),
    ],
)
def test_errors_say_what_is_wrong(
    server: Live, path: str, body: dict[str, Any], words: str
) -> None:
    with server.http() as http:
        reply = http.post(path, json=body)
    assert reply.status_code == 400
    assert words in reply.json()["error"]["message"]
