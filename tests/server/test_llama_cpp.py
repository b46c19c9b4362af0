"""llama.cpp's own routes."""

import asyncio
import json
from typing import Any

import pytest
from live_server import CONTEXT, Live

from deepseek.server import encoding
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
