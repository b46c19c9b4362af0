"""Fill-in-the-middle: `suffix` of `/v1/completions`, and `/infill` as llama.cpp's editor plug-ins
send it.
"""

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
from live_server import CONTEXT, Live
from openai import OpenAI

from deepseek.engine.request import Request
from deepseek.engine.sampler import Sampling
from deepseek.server.dialects import llama_cpp
from deepseek.server.dialects.infill import InfillRequest
from deepseek.server.dialects.llama_cpp import NativeChunks
from deepseek.server.prompt import EditorGap

RING = [
    {"filename": "src/model.py", "text": "class Model:\n    pass\n", "time": [12, 345]},
    {"filename": "src/value.py", "text": "def value():\n    return 1\n", "time": [13, 1]},
]

VIM: dict[str, Any] = {
    "input_prefix": "import os\n\ndef value(model):\n",
    "input_suffix": "\n\nprint(value(1))\n",
    "input_extra": RING,
    "prompt": "    return the ",
    "n_predict": 12,
    "stop": [],
    "n_indent": 4,
    "top_k": 40,
    "top_p": 0.90,
    "stream": False,
    "samplers": ["top_k", "top_p", "infill"],
    "cache_prompt": True,
    "t_max_prompt_ms": 500,
    "t_max_predict_ms": 250,
    "response_fields": [
        "content",
        "timings/prompt_n",
        "timings/prompt_ms",
        "timings/prompt_per_token_ms",
        "timings/prompt_per_second",
        "timings/predicted_n",
        "timings/predicted_ms",
        "timings/predicted_per_token_ms",
        "timings/predicted_per_second",
        "truncated",
        "tokens_cached",
    ],
}
"""Request of llama.vim while the user types."""

VIM_WARMS_UP: dict[str, Any] = {
    "id_slot": 0,
    "input_prefix": "",
    "input_suffix": "",
    "input_extra": RING,
    "prompt": "",
    "n_predict": 0,
    "temperature": 0.0,
    "stream": False,
    "samplers": [],
    "cache_prompt": True,
    "t_max_prompt_ms": 1,
    "t_max_predict_ms": 1,
    "response_fields": [""],
}
"""Background request of llama.vim to cache the context."""

VSCODE: dict[str, Any] = {
    "input_prefix": "def value(model):\n",
    "input_suffix": ")\n",
    "input_extra": [{"text": "x = 1\n", "time": 1733000000000, "filename": "a.py"}],
    "prompt": "    print(",
    "n_predict": 8,
    "top_k": 40,
    "top_p": 0.99,
    "stream": False,
    "samplers": ["top_k", "top_p", "infill"],
    "cache_prompt": True,
    "n_indent": 4,
    "t_max_prompt_ms": 500,
    "t_max_predict_ms": 2500,
}
"""Request of llama.vscode."""


INSTRUCTION = [
    {"role": "system", "content": "You are a code-editing assistant."},
    {"role": "user", "content": "Rename the function."},
]

VIM_INSTRUCTS: dict[str, Any] = {
    "id_slot": 3,
    "messages": INSTRUCTION,
    "min_p": 0.1,
    "temperature": 0.1,
    "samplers": ["min_p", "temperature"],
    "stream": True,
    "cache_prompt": True,
    "model": "",
}
"""Request of llama.vim to `/v1/chat/completions` for an instruction."""

VIM_WARMS_THE_INSTRUCTION_UP: dict[str, Any] = {
    "id_slot": 3,
    "messages": INSTRUCTION,
    "samplers": [],
    "n_predict": 0,
    "stream": False,
    "cache_prompt": True,
    "response_fields": [""],
    "model": "",
}
"""Request of llama.vim to `/v1/chat/completions` while the instruction is typed."""


def post(server: Live, body: dict[str, Any], route: str = "/infill") -> Any:
    with server.http() as http:
        reply = http.post(route, json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_vims_request_gets_the_fields_that_it_names(server: Live) -> None:
    reply = post(server, VIM)
    assert set(reply) <= set(VIM["response_fields"])
    assert isinstance(reply["content"], str)
    assert reply["timings/predicted_n"] >= 1
    assert reply["timings/prompt_n"] + reply["tokens_cached"] > 20
    assert reply["truncated"] is False


def test_the_warm_up_says_nothing_and_fills_the_cache(server: Live) -> None:
    assert post(server, VIM_WARMS_UP) == {}


def test_vims_instructions_are_answered(server: Live) -> None:
    route = "/v1/chat/completions"
    warm = post(server, VIM_WARMS_THE_INSTRUCTION_UP, route)
    assert warm["usage"]["completion_tokens"] == 1
    assert warm["model"] == "tiny"
    with server.http() as http:
        reply = http.post(route, json={**VIM_INSTRUCTS, "n_predict": 4})
    assert reply.status_code == 200, reply.text
    assert reply.text.startswith("data: ") and '"delta"' in reply.text


def test_no_names_of_fields_ask_for_all(server: Live) -> None:
    assert "content" in post(server, {**VSCODE, "response_fields": []})


def test_vscodes_request_gets_a_whole_reply(server: Live) -> None:
    reply = post(server, VSCODE)
    assert reply["content"] == post(server, VSCODE)["content"]  # greedy without a temperature
    assert reply["timings"]["predicted_n"] <= 8
    assert reply["stop"] is True


def test_a_large_limit_leaves_room_for_the_text(server: Live) -> None:
    """Regression: all of `n_predict` was reserved, and 28 tokens of the text were left."""
    prefix = "".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(8))
    body = {**VSCODE, "input_prefix": prefix, "n_predict": 8}
    evaluated = post(server, body)["tokens_evaluated"]
    assert post(server, {**body, "n_predict": 2 * CONTEXT})["tokens_evaluated"] == evaluated


def test_a_stream_says_what_the_whole_reply_says(server: Live) -> None:
    with server.http() as http:
        text = http.post("/infill", json={**VSCODE, "stream": True}).text
    assert text.startswith("data: ")
    assert text.count('"stop":true') == 1


def test_the_context_fits_however_much_an_editor_sends(server: Live) -> None:
    writer = server.service.writer
    gap = EditorGap(
        prefix="first = 1\n" * 3000 + "near the gap\n",
        line="    return ",
        suffix=" after it\n" + "far away\n" * 3000,
        others=[("old.py", "old\n" * 500), ("new.py", "the newest\n")],
    )
    ids = writer.gap(gap, 100)
    text = server.engine.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert len(ids) + 100 < CONTEXT
    assert text.endswith("near the gap\n    return ")
    assert "<fim_suffix> after it\n" in text
    short = EditorGap("a\n", "b", "c\n", gap.others)
    text = server.engine.tokenizer.decode(writer.gap(short, 400))
    assert "file: new.py\n\nthe newest\n" in text
    assert text.endswith("<fim_prefix>a\nb")
    assert len(writer.gap(gap, CONTEXT)) < CONTEXT


def test_a_suffix_is_laid_out_as_in_training(server: Live, client: OpenAI) -> None:
    asked = client.completions.create(
        model="tiny", prompt="the value ", suffix="\nof", max_tokens=8, temperature=0
    )
    ids = server.service.writer.infill("the value ", "\nof")
    sampling = Sampling(8, temperature=0.0)
    healed = list(server.engine.submit(Request(tuple(ids), sampling, heal=True)))
    assert asked.choices[0].text == "".join(event.text for event in healed)
    # The prompt's last token, which token healing samples again, counts once.
    assert asked.usage is not None and asked.usage.prompt_tokens == len(ids)
    assert asked.usage.completion_tokens <= 8


def test_a_marker_before_an_empty_prompt_is_not_healed(server: Live, client: OpenAI) -> None:
    asked = client.completions.create(
        model="tiny", prompt="", suffix="of", max_tokens=8, temperature=0
    )
    ids = server.service.writer.infill("", "of")
    assert asked.usage is not None and asked.usage.prompt_tokens == len(ids)
    assert post(server, {"input_suffix": "of", "n_predict": 4})["tokens_evaluated"] == len(ids)


def test_a_grammar_takes_the_prompt_as_it_is(server: Live, client: OpenAI) -> None:
    asked = client.completions.create(
        model="tiny",
        prompt="the val",
        suffix="\nof",
        max_tokens=8,
        extra_body={"guided_regex": "[ab]{3}"},
    )
    assert re.fullmatch("[ab]{3}", asked.choices[0].text)


def test_no_answer_ends_once(server: Live, client: OpenAI) -> None:
    """Tokens that token healing samples for the prompt's last one have their own events."""
    asked: dict[str, Any] = {"model": "tiny", "prompt": "the rou", "suffix": "x", "max_tokens": 0}
    chunks = list(client.completions.create(**asked, stream=True))
    reply = client.completions.create(**asked)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == ["length"]
    assert reply.choices[0].finish_reason == "length"


def test_a_reply_does_not_repeat_the_texts(server: Live) -> None:
    settings = post(server, VSCODE)["generation_settings"]
    assert settings["n_predict"] == VSCODE["n_predict"]
    assert not [name for name in settings if name.startswith(("input_", "prompt"))]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": [5, 6], "suffix": "x"}, "suffix"),
        ({"echo": True, "suffix": "x"}, "suffix"),
        ({"suffix": 5}, "suffix"),
        ({"suffix": "word " * 4000}, "suffix"),
    ],
)
def test_what_a_suffix_does_not_go_with_is_refused(
    server: Live, fields: dict[str, Any], param: str
) -> None:
    with server.http() as http:
        reply = http.post("/v1/completions", json={"model": "tiny", "prompt": "a", **fields})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param


@pytest.mark.parametrize(
    "fields", [{"input_extra": [{"filename": "x"}]}, {"lora": [{"id": 0}]}, {"n_indent": -1}]
)
def test_a_bad_gap_is_refused(server: Live, fields: dict[str, Any]) -> None:
    with server.http() as http:
        reply = http.post("/infill", json={"input_prefix": "a", **fields})
    assert reply.status_code == 400
    assert reply.json()["error"]["message"].endswith(".")


@pytest.mark.parametrize(
    "fields", [{}, {"prompt": ""}, {"input_extra": [{"filename": "a.py", "text": ""}]}]
)
def test_a_gap_without_text_around_it_is_refused(server: Live, fields: dict[str, Any]) -> None:
    with server.http() as http:
        reply = http.post("/infill", json={"n_predict": 4, **fields})
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, "input_prefix")
    assert "no text around the gap" in error["message"]


class Written:
    """Replaces an answer that arrives in these pieces."""

    def __init__(self, pieces: list[str]) -> None:
        self.pieces = pieces

    async def all_choices(self) -> AsyncIterator[dict[str, Any]]:
        for number, piece in enumerate(self.pieces):
            last = number == len(self.pieces) - 1
            yield {"text": piece, "finish_reason": "stop" if last else None, "stop_reason": None}


def filled(pieces: list[str], **fields: Any) -> tuple[str, str]:
    """Return the text of an answer, and the reason why it ended."""
    chunks = NativeChunks(InfillRequest(**fields), Written(pieces), 0.0)  # type: ignore[arg-type]

    async def choices() -> list[dict[str, Any]]:
        return [choice async for choice in chunks.choices()]

    all_choices = asyncio.run(choices())
    text = "".join(choice["text"] for choice in all_choices)
    return text, all_choices[-1]["finish_reason"]


WHOLE = "x)\n        y\n\n    z\nend\nmore"


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_the_text_ends_where_its_block_ends(size: int) -> None:
    pieces = [WHOLE[start : start + size] for start in range(0, len(WHOLE), size)]
    assert filled(pieces) == (WHOLE, "stop")
    assert filled(pieces, n_indent=4) == ("x)\n        y\n\n    z", "stop")
    assert filled(pieces, n_indent=8) == ("x)\n        y", "stop")


def test_out_of_time_the_text_ends_with_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(llama_cpp.time, "perf_counter", lambda: next(clock))
    assert filled(["a", "\nb", "\nc", "\nd"], t_max_predict_ms=1500) == ("a\nb", "length")
