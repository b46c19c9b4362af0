"""Fields of single routes: `dimensions` of embeddings, `chat_template_kwargs`."""

import math
from typing import Any

import pytest
from live_server import Live

ASKED = [{"role": "user", "content": "the value"}]


def embedded(server: Live, **fields: Any) -> list[float]:
    body = {"model": "tiny", "input": "the value of the model", **fields}
    with server.http() as http:
        reply = http.post("/v1/embeddings", json=body)
    assert reply.status_code == 200, reply.text
    vector: list[float] = reply.json()["data"][0]["embedding"]
    return vector


@pytest.mark.parametrize("dimensions", [1, 5, 32])
def test_vectors_are_cut_and_have_length_1(server: Live, dimensions: int) -> None:
    whole = embedded(server)[:dimensions]
    cut = embedded(server, dimensions=dimensions)
    assert cut == pytest.approx([value / math.hypot(*whole) for value in whole])
    with server.http() as http:
        body = {"model": "tiny", "input": "the value of the model", "dimensions": dimensions}
        assert http.post("/api/embed", json=body).json()["embeddings"][0] == pytest.approx(cut)


@pytest.mark.parametrize("path", ["/v1/embeddings", "/api/embed"])
def test_there_are_no_more_dimensions_than_the_model_s(server: Live, path: str) -> None:
    with server.http() as http:
        reply = http.post(path, json={"model": "tiny", "input": "a", "dimensions": 33})
    assert reply.status_code == 400
    assert "32 dimensions" in reply.text


def rendered(server: Live, **fields: Any) -> str:
    with server.http() as http:
        reply = http.post("/apply-template", json={"messages": ASKED, **fields})
    assert reply.status_code == 200, reply.text
    return str(reply.json()["prompt"])


def test_templates_read_further_variables(server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = server.engine.tokenizer
    template = tokenizer.chat_template + "{% if note %}{{ note }}{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    plain = rendered(server)
    assert rendered(server, chat_template_kwargs={"note": "the model"}) == plain + "the model"
    with server.http() as http:
        counts = [
            http.post("/tokenize", json={"messages": ASKED, "chat_template_kwargs": values}).json()
            for values in ({}, {"note": "the model"})
        ]
        reply = http.post(
            "/v1/chat/completions",
            json={
                "model": "tiny",
                "max_tokens": 1,
                "messages": ASKED,
                "chat_template_kwargs": {"note": "the model"},
            },
        ).json()
    assert counts[1]["count"] > counts[0]["count"]
    assert reply["usage"]["prompt_tokens"] == counts[1]["count"]


def test_variables_cannot_write_control_tokens(
    server: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = server.engine.tokenizer
    monkeypatch.setattr(tokenizer, "chat_template", tokenizer.chat_template + "{{ note }}")
    token = max(tokenizer.get_added_vocab())
    with server.http() as http:
        reply = http.post(
            "/tokenize", json={"messages": ASKED, "chat_template_kwargs": {"note": token}}
        ).json()
    assert reply["tokens"][-1] != tokenizer.get_added_vocab()[token]


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "tools", "messages"])
def test_variables_cannot_replace_arguments(server: Live, name: str) -> None:
    body = {"model": "tiny", "messages": ASKED, "chat_template_kwargs": {name: "x"}}
    with server.http() as http:
        reply = http.post("/v1/chat/completions", json=body)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert name in error["message"] and error["param"] == "chat_template_kwargs"


def test_models_say_their_context_and_age(server: Live) -> None:
    with server.http() as http:
        card = http.get("/v1/models").json()["data"][0]
    assert card["max_model_len"] == server.service.writer.context
    assert card["created"] > 1_600_000_000
