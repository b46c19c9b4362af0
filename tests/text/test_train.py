"""A trained tokenizer loses nothing and keeps control tokens apart from text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.errors import ConfigError
from deepseek.text.tokenizer import document_end_id, encode_plain, train_tokenizer

TOKENIZER = train_tokenizer(
    ["the quick brown fox jumps over the lazy dog 12345\n    return x\n"] * 20, 320
)


@given(st.text())
def test_every_text_comes_back(text: str) -> None:
    (ids,) = encode_plain(TOKENIZER, [text])
    assert TOKENIZER.decode(ids) == text and document_end_id(TOKENIZER) not in ids


def test_merges_are_learned_and_conversations_rendered() -> None:
    assert len(TOKENIZER) <= 320
    assert len(TOKENIZER(" quick").input_ids) < len(" quick")
    chat = TOKENIZER.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match="vocab_size=100 is too small"):
        train_tokenizer(["a"], 100)
