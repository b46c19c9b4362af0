"""Token texts with a decoder that drops the space before a text, like Llama 2's."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from live_server import Live, live
from tiny_expert import save_base
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from deepseek.engine.vocabulary import Vocabulary
from deepseek.server.token_text import TokenReader, TokenText, TokenTexts

SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = ["\u2581", *"thevalu", "\u2581t", "he", "\u2581the", "\u2581v", "al", "\u2581val", "ue"]
PIECES += ["\u2581value", "the", "val", "value"]
MERGES = [
    *[("\u2581", "t"), ("h", "e"), ("\u2581t", "he"), ("\u2581", "v"), ("a", "l"), ("u", "e")],
    *[("\u2581v", "al"), ("\u2581val", "ue"), ("t", "he"), ("v", "al"), ("val", "ue")],
]
IDS = {piece: place for place, piece in enumerate([*SPECIAL, *BYTES, *PIECES])}
WHOLE: dict[str, Any] = {
    "model": "tiny",
    "max_tokens": 40,
    "temperature": 1,
    "seed": 3,
    # Neither end tokens nor parts of characters.
    "logit_bias": {str(IDS[piece]): -100 for piece in [*SPECIAL, *BYTES]},
}
TEXT = "the value the the"
ASKED = [{"role": "user", "content": TEXT}]


def like_llama() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(IDS, MERGES, byte_fallback=True, unk_token="<unk>"))
    steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    backend.normalizer = normalizers.Sequence(steps)
    fused = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*fused, decoders.Strip(" ", 1, 0)])
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template="{% for m in messages %}{{ m['content'] }}</s>{% endfor %}",
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("llama")
    base = save_base(folder / "tiny", vocab_size=len(IDS), eos_token_id=2)
    like_llama().save_pretrained(base)
    with live(folder) as running:
        yield running


def post(server: Live, path: str, body: dict[str, Any]) -> Any:
    with server.http() as http:
        reply = http.post(path, json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


@pytest.mark.parametrize("prompt", [TEXT, [5, 9], [1, IDS["\u2581the"]], [IDS["\u2581the"]]])
@pytest.mark.parametrize("echo", [False, True])
def test_tokens_join_to_the_text(llama: Live, prompt: Any, echo: bool) -> None:
    body = {**WHOLE, "prompt": prompt, "echo": echo, "logprobs": 5}
    choice = post(llama, "/v1/completions", body)["choices"][0]
    tokens = choice["logprobs"]["tokens"]
    if echo and prompt == TEXT:
        assert (tokens.pop(0), choice["logprobs"]["text_offset"].pop(0)) == ("<s>", 0)
    assert "".join(tokens) == choice["text"]
    sizes = [len(token) for token in tokens]
    assert choice["logprobs"]["text_offset"] == [sum(sizes[:n]) for n in range(len(sizes))]
    assert any(token.startswith(" ") for token in tokens[1:])


def test_a_character_of_several_tokens_counts_once(llama: Live) -> None:
    text = "the \U0001f600 value \u00e9the"
    body = {"model": "tiny", "prompt": text, "echo": True, "logprobs": 0, "max_tokens": 0}
    choice = post(llama, "/v1/completions", body)["choices"][0]
    assert choice["text"] == text
    columns = choice["logprobs"]
    placed = list(zip(columns["tokens"], columns["text_offset"], strict=True))[1:]  # without <s>
    assert all(text.startswith(token, place) for token, place in placed if token != "\ufffd")
    assert [place for token, place in placed if token == "\ufffd"] == [4, 4, 4, 4, 12, 12]


def test_alternatives_do_not_collide(llama: Live) -> None:
    text = {**WHOLE, "prompt": TEXT, "logprobs": 20}
    chat = {**WHOLE, "messages": ASKED, "logprobs": True, "top_logprobs": 20}
    columns = post(llama, "/v1/completions", text)["choices"][0]["logprobs"]
    told = set().union(*columns["top_logprobs"][1:])
    assert {"the", " the"} <= told
    content = post(llama, "/v1/chat/completions", chat)["choices"][0]["logprobs"]["content"]
    for token in content[1:]:
        assert len({bytes(one["bytes"]) for one in token["top_logprobs"]}) == 20


def test_parts_of_characters_have_their_bytes(llama: Live) -> None:
    body = {"model": "tiny", "messages": ASKED, "max_tokens": 20, "logprobs": True}
    body |= {"guided_regex": "the \u00e9the"}
    choice = post(llama, "/v1/chat/completions", body)["choices"][0]
    content = choice["logprobs"]["content"]
    assert choice["message"]["content"] == "the \u00e9the"
    assert [one["bytes"] for one in content if one["token"] == "\ufffd"] == [[0xC3], [0xA9]]
    written = b"".join(bytes(one["bytes"]) for one in content if one["token"] != "</s>")
    assert written.decode() == choice["message"]["content"]


@given(st.lists(st.sampled_from(["the", " ", "value", "\u00e9", "t", "\n"])).map("".join))
def test_the_bytes_of_the_tokens_join_to_the_text(llama: Live, text: str) -> None:
    reader = TokenReader(llama.service.tokens)
    ids = llama.engine.tokenizer(text).input_ids[1:]
    contents = [reader.at(token)(token).content or b"" for token in ids]
    assert b"".join(contents).decode() == text


@pytest.mark.parametrize("text", [TEXT, "t\u00e9 value", " the", "\u00e9"])
def test_pieces_join_to_the_text(llama: Live, text: str) -> None:
    tokens = post(llama, "/tokenize", {"content": text, "with_pieces": True})["tokens"]
    pieces = [token["piece"] for token in tokens]
    whole = b"".join(one.encode() if isinstance(one, str) else bytes(one) for one in pieces)
    assert whole.decode() == text


def test_a_decoder_that_tells_no_bytes_still_tells_texts() -> None:
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "the": 1, "\ufffd": 2}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[UNK]")
    model = SimpleNamespace(config=PreTrainedConfig(vocab_size=3), generation_config=None)
    vocabulary = Vocabulary(cast(Any, model), tokenizer)
    engine = SimpleNamespace(tokenizer=tokenizer, token_bytes=vocabulary.token_bytes)
    texts = TokenTexts(cast(Any, engine))
    assert texts.within(1) == texts.first(1) == TokenText("the", b"the")
    assert texts.within(2) == TokenText("\ufffd", None)
