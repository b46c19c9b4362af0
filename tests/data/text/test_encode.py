"""One document to ids: what stands around it, what is a target, fill-in-the-middle."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import tiny_tokenizer

from deepseek.data import Document, EncodeOptions
from deepseek.data.text import encode as encode_module
from deepseek.data.text.document import conversation
from deepseek.data.text.encode import CONTEXT_BIT, DocumentEncoder, fim_markers, pieces

TOKENIZER = tiny_tokenizer()
FIM = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>")
FIM_TOKENIZER = tiny_tokenizer(FIM)
CODE = Document("def f():\n    return the_model\n" * 5, "repo/f.py", "code")


def text_of(document: Document, options: EncodeOptions, tokenizer: object = TOKENIZER) -> str:
    ids = next(DocumentEncoder(tokenizer, options).encode([document]))
    return tokenizer.decode(ids & ~CONTEXT_BIT, clean_up_tokenization_spaces=False)


def test_code_and_commits_are_told_where_they_lie_and_prose_is_not() -> None:
    assert text_of(CODE, EncodeOptions()) == f"file: repo/f.py\n\n{CODE.text}<|endoftext|>"
    assert text_of(CODE, EncodeOptions(header=False)) == f"{CODE.text}<|endoftext|>"
    assert (
        text_of(Document("Fix it", "repo@12", "commit"), EncodeOptions())
        == "commit: repo@12\n\nFix it<|endoftext|>"
    )
    assert text_of(Document("Once", "book"), EncodeOptions()) == "Once<|endoftext|>"


def test_the_header_is_given_and_never_a_target() -> None:
    (ids,) = DocumentEncoder(TOKENIZER, EncodeOptions()).encode([CODE])
    assert TOKENIZER.decode(ids[(ids & CONTEXT_BIT) == 0]) == f"{CODE.text}<|endoftext|>"


def test_everything_is_a_target_but_what_others_said() -> None:
    ask, answer = {"role": "user", "content": "why?"}, {"role": "assistant", "content": "because"}
    encoder = DocumentEncoder(TOKENIZER, EncodeOptions())
    prose, chat = encoder.encode([Document("Once", "book"), conversation([ask, answer], "c", "c")])
    assert not (prose & CONTEXT_BIT).any()
    assert TOKENIZER.decode(chat[(chat & CONTEXT_BIT) == 0]) == "because<|im_end|>"


@given(st.text("ab\n ", max_size=400))
def test_pieces_join_to_the_text(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode_module, "CHUNK", 50)
        parts = pieces(text)
    assert "".join(parts) == text
    assert all(len(part) <= 50 for part in parts)
    assert all(part for part in parts[:-1])


def test_long_texts_are_cut_at_line_ends_only(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = text_of(CODE, EncodeOptions())
    monkeypatch.setattr(encode_module, "CHUNK", 64)
    assert text_of(CODE, EncodeOptions()) == whole
    assert all(part.endswith("\n") for part in pieces(CODE.text)[:-1])


@pytest.mark.parametrize("tokenizer", [FIM_TOKENIZER, TOKENIZER], ids=["tokens", "spelled"])
def test_the_middle_moves_to_the_end_and_nothing_is_lost(tokenizer: object) -> None:
    text = text_of(CODE, EncodeOptions(fim_rate=1.0, header=False), tokenizer).removesuffix(
        "<|endoftext|>"
    )
    before, rest = text.removeprefix(FIM[0]).split(FIM[1])
    after, middle = rest.split(FIM[2])
    assert before + middle + after == CODE.text
    assert before and middle


def test_fill_in_markers_are_control_tokens_where_the_tokenizer_has_them() -> None:
    assert [len(marker) for marker in fim_markers(FIM_TOKENIZER)] == [1, 1, 1]
    assert all(len(marker) > 1 for marker in fim_markers(TOKENIZER))


def test_the_rate_holds_and_prose_is_never_rearranged() -> None:
    options = EncodeOptions(fim_rate=0.5)
    documents = [
        Document("def f(): return 1\n", f"repo/{number}.py", "code") for number in range(400)
    ]
    rearranged = sum("<fim_middle>" in text_of(document, options) for document in documents)
    assert 150 < rearranged < 250
    prose = Document("Once upon a time", "repo/0.md", "text")
    assert text_of(prose, EncodeOptions(fim_rate=1.0)) == "Once upon a time<|endoftext|>"


def test_the_same_seed_cuts_in_the_same_place() -> None:
    encoded = [
        next(DocumentEncoder(TOKENIZER, EncodeOptions(fim_rate=1.0, seed=s)).encode([CODE]))
        for s in (1, 1, 2)
    ]
    assert np.array_equal(encoded[0], encoded[1])
    assert not np.array_equal(encoded[0], encoded[2])
