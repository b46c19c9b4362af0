"""`retrieve` in a request: passages from the index beside a pack are added to the prompt, and the
reply cites them.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from live_server import CONTEXT, Live, live
from openai import OpenAI

from deepseek.data import Document
from deepseek.engine.request import Request
from deepseek.packs.library import index_folder
from deepseek.retrieval.index import Index

ASKED: list[Any] = [{"role": "user", "content": "Where is the router of the model?"}]
TEXT = Document(
    "".join(f"router_{n} = model.router({n})\n" for n in range(9)), "repo/router.py", "code"
)


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server with the experts `one`, which has an index, and `two`."""
    with live(tmp_path_factory.mktemp("indexed")) as server:
        server.engine.plug(server.folder / "one.safetensors")
        server.engine.plug(server.folder / "two.safetensors")
        Index.build([TEXT]).save(index_folder("one", server.folder))
        yield server


@pytest.fixture(scope="module")
def asking(indexed: Live) -> Iterator[OpenAI]:
    with indexed.client() as client:
        yield client


def chat(client: OpenAI, retrieve: Any, **fields: Any) -> Any:
    given = {"model": "tiny", "messages": ASKED, "max_tokens": 2, "temperature": 0, **fields}
    return client.chat.completions.create(**given, extra_body={"retrieve": retrieve})


def complete(client: OpenAI, retrieve: Any, **fields: Any) -> Any:
    given = {
        "model": "tiny",
        "prompt": "the router = model.",
        "max_tokens": 2,
        "temperature": 0,
        **fields,
    }
    return client.completions.create(**given, extra_body={"retrieve": retrieve})


def infill(server: Live, **fields: Any) -> dict[str, Any]:
    """Return the reply to an editor's request."""
    around = {"input_prefix": "x = 1\n", "prompt": "the router = model.", "input_suffix": "\ny"}
    with server.http() as http:
        reply = http.post("/infill", json={**around, "n_predict": 4, **fields})
    assert reply.status_code == 200, reply.text
    whole: dict[str, Any] = reply.json()
    return whole


@pytest.mark.parametrize("ask", [chat, complete])
@pytest.mark.parametrize("retrieve", [True, 1, "one"])
def test_passages_come_into_the_prompt_and_are_named(
    asking: OpenAI, ask: Any, retrieve: Any
) -> None:
    alone, helped = ask(asking, False), ask(asking, retrieve)
    assert helped.retrieved == ["repo/router.py:1-9"] and not hasattr(alone, "retrieved")
    assert helped.usage.prompt_tokens > alone.usage.prompt_tokens + 20


def test_the_prompt_is_that_of_the_documentation(asking: OpenAI, indexed: Live) -> None:
    helped = complete(asking, True, prompt=["the router", "x of y"])
    expected = [f"file: repo/router.py\n\n{TEXT.text}\nthe router", "x of y"]
    same = asking.completions.create(model="tiny", prompt=expected, max_tokens=2, temperature=0)
    assert [choice.text for choice in helped.choices] == [choice.text for choice in same.choices]
    assert helped.usage.prompt_tokens == same.usage.prompt_tokens


def test_a_stream_says_at_its_end_what_was_retrieved(asking: OpenAI) -> None:
    stream = chat(asking, True, stream=True, stream_options={"include_usage": True})
    assert list(stream)[-1].retrieved == ["repo/router.py:1-9"]


def test_a_message_says_what_was_retrieved(indexed: Live) -> None:
    body = {"model": "tiny", "messages": ASKED, "max_tokens": 2, "retrieve": True}
    with indexed.http() as http:
        whole = http.post("/v1/messages", json=body).json()
        stream = http.post("/v1/messages", json={**body, "stream": True}).text
        plain = http.post("/v1/messages", json={**body, "retrieve": False}).json()
    assert whole["retrieved"] == ["repo/router.py:1-9"]
    assert '"retrieved":["repo/router.py:1-9"]' in stream
    assert "retrieved" not in plain


@pytest.mark.parametrize("retrieve", [True, 1, "one"])
def test_an_editor_gets_passages_as_other_files(indexed: Live, retrieve: Any) -> None:
    alone, helped = infill(indexed), infill(indexed, retrieve=retrieve)
    assert helped["retrieved"] == ["repo/router.py:1-9"] and "retrieved" not in alone
    sent = [{"filename": TEXT.name, "text": TEXT.text}]
    same = infill(indexed, input_extra=sent)
    assert helped["tokens_evaluated"] == same["tokens_evaluated"] > alone["tokens_evaluated"] + 20
    assert helped["content"] == same["content"]
    with_more = infill(indexed, input_extra=sent, retrieve=retrieve)
    assert with_more["tokens_evaluated"] > helped["tokens_evaluated"] + 20


def test_an_editor_that_cannot_ask_gets_the_passages_of_the_setting(
    indexed: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = infill(indexed, retrieve=1)
    usual = replace(indexed.service.settings, infill_passages=1)
    monkeypatch.setattr(indexed.service, "settings", usual)
    unasked = infill(indexed)
    assert unasked["retrieved"] == asked["retrieved"] == ["repo/router.py:1-9"]
    assert unasked["content"] == asked["content"]
    assert "retrieved" not in infill(indexed, retrieve=False)
    # An expert without an index has no passages, and the request succeeds all the same.
    assert "retrieved" not in infill(indexed, model="tiny+two")


@pytest.mark.parametrize(
    ("route", "fields"),
    [
        ("/infill", {"n_predict": 2, "input_suffix": "\ny"}),
        ("/completion", {"n_predict": 2}),
        ("/v1/completions", {"max_tokens": 2, "model": "tiny", "suffix": "\ny"}),
        ("/v1/completions", {"max_tokens": 2, "model": "tiny"}),
    ],
)
def test_gates_judge_the_text_without_its_passages(
    indexed: Live, route: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passages are an expert's own text, and would admit it to any topic."""
    submitted: list[Request] = []
    submit = indexed.engine.submit_all
    monkeypatch.setattr(
        indexed.engine, "submit_all", lambda some: submitted.extend(some) or submit(some)
    )
    asked = {"prompt": "the router = model.", **fields}
    with indexed.http() as http:
        replies = [http.post(route, json={**asked, "retrieve": on}) for on in (False, True)]
    assert [reply.status_code for reply in replies] == [200, 200]
    alone, helped = submitted
    assert len(helped.prompt_ids) > len(alone.prompt_ids) + 20
    assert helped.document_ids == alone.prompt_ids
    assert alone.document_ids in (None, alone.prompt_ids)


def test_passages_come_before_a_suffix(asking: OpenAI, indexed: Live) -> None:
    suffix = {"suffix": "(2)\n"}
    alone, helped = complete(asking, False, **suffix), complete(asking, True, **suffix)
    assert helped.retrieved == ["repo/router.py:1-9"]
    assert helped.usage.prompt_tokens > alone.usage.prompt_tokens + 20
    same = infill(
        indexed,
        prompt="the router = model.",
        input_prefix="",
        input_suffix="(2)\n",
        retrieve=True,
        n_predict=2,
    )
    assert same["tokens_evaluated"] == helped.usage.prompt_tokens
    assert same["content"] == helped.choices[0].text


def test_the_native_completion_retrieves_too(indexed: Live) -> None:
    body = {"prompt": "the router = model.", "n_predict": 2, "retrieve": True, "temperature": 0}
    with indexed.http() as http:
        reply = http.post("/completion", json=body).json()
        stream = http.post("/completion", json={**body, "stream": True}).text
    assert reply["retrieved"] == ["repo/router.py:1-9"]
    assert stream.count('"retrieved":["repo/router.py:1-9"]') == 1


def test_what_does_not_fit_is_left_out(asking: OpenAI) -> None:
    reply = complete(asking, True, prompt=[99] * 720)
    assert reply.retrieved == [] and reply.usage.prompt_tokens == 720


@pytest.mark.parametrize("ask", [chat, complete])
def test_a_limit_beyond_the_context_leaves_passages_in(
    asking: OpenAI, indexed: Live, ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many clients always ask for the maximum number of tokens."""
    usual = replace(indexed.service.settings, answer_tokens=200)
    monkeypatch.setattr(indexed.service, "settings", usual)
    end = str(indexed.engine.tokenizer.eos_token_id)
    helped = ask(asking, True, max_tokens=2 * CONTEXT, logit_bias={end: 100})
    assert helped.retrieved == ["repo/router.py:1-9"]


@pytest.mark.parametrize("words", [130, 170, 210])
def test_headers_leave_room_for_prompt_and_answer(
    asking: OpenAI, indexed: Live, words: int
) -> None:
    path = "a/" * 40
    texts = [
        Document(TEXT.text[:80].replace("router", f"router{n}"), f"{path}{n}.py", "code")
        for n in range(4)
    ]
    Index.build(texts).save(index_folder("deep", indexed.folder))
    asked: list[Any] = [{"role": "user", "content": "the model router0 router1" + " é" * words}]
    reply = chat(asking, "deep", messages=asked, max_tokens=16)
    assert reply.usage.prompt_tokens + 16 <= CONTEXT


@pytest.mark.parametrize(
    ("fields", "retrieve", "status", "complaint"),
    [
        (
            {},
            "three",
            404,
            "There is no index 'three'; make one with `deepseek expert index three`",
        ),
        (
            {"model": "tiny+two"},
            True,
            400,
            "No expert that this request may use (two) has an index",
        ),
        ({"model": "tiny+none"}, 2, 400, "No expert that this request may use (none) has an index"),
        ({}, 0, 400, "retrieve"),
        ({}, "../one", 400, "retrieve"),
        ({}, "/etc/passwd", 400, "retrieve"),
    ],
)
def test_a_mistake_is_an_error_of_openai(
    asking: OpenAI, fields: dict[str, Any], retrieve: Any, status: int, complaint: str
) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        chat(asking, retrieve, **fields)
    assert caught.value.status_code == status and complaint in str(caught.value)


def test_echo_and_retrieve_exclude_each_other(asking: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="leave one out"):
        complete(asking, True, echo=True)


def test_an_index_that_changes_is_read_again_and_a_damaged_one_is_told(
    asking: OpenAI, indexed: Live
) -> None:
    folder: Path = index_folder("two", indexed.folder)
    Index.build([TEXT]).save(folder)
    assert complete(asking, "two").retrieved == ["repo/router.py:1-9"]
    Index.build([Document("router of two\n", "repo/two.py", "code")]).save(folder)
    assert complete(asking, "two").retrieved == ["repo/two.py:1-1"]
    (folder / "passages.jsonl").write_text("")
    (folder / "meta.json").touch()
    with pytest.raises(openai.InternalServerError, match="damaged"):
        complete(asking, "two")
