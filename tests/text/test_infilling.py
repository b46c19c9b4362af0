"""Infilling has one layout for training, evaluation and serving."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import tiny_tokenizer

from deepseek.text.control import FIM_TOKENS
from deepseek.text.infilling import infill_layout
from deepseek.text.tokenizer import encode_plain

PLAIN = tiny_tokenizer()
IDS = st.lists(st.integers(3, 200), max_size=8)


@pytest.mark.parametrize("names", FIM_TOKENS)
def test_a_model_with_tokens_gets_prefix_suffix_middle(names: tuple[str, str, str]) -> None:
    tokenizer = tiny_tokenizer(names)
    layout = infill_layout(tokenizer)
    assert layout.has_tokens
    prefix, suffix = encode_plain(tokenizer, ["a = ", "\nb"])
    text = tokenizer.decode(layout.join(prefix, suffix), clean_up_tokenization_spaces=False)
    assert text == f"{names[0]}a = {names[1]}\nb{names[2]}"


def test_another_model_gets_the_prefix_last() -> None:
    layout = infill_layout(PLAIN)
    assert not layout.has_tokens
    prefix, suffix = encode_plain(PLAIN, ["a = ", "\nb"])
    text = PLAIN.decode(layout.join(prefix, suffix), clean_up_tokenization_spaces=False)
    assert text == "<fim_suffix>\nb<fim_prefix>a = "


@pytest.mark.parametrize("tokenizer", [PLAIN, tiny_tokenizer(FIM_TOKENS[1])])
@given(prefix=IDS, suffix=IDS)
def test_markers_are_told_from_the_text(
    tokenizer: object, prefix: list[int], suffix: list[int]
) -> None:
    layout = infill_layout(tokenizer)
    ids = layout.join(prefix, suffix)
    flags = layout.is_marker(prefix, suffix)
    text = [token for token, flag in zip(ids, flags, strict=True) if not flag]
    assert sum(flags) == layout.markers
    assert text == ([*prefix, *suffix] if layout.has_tokens else [*suffix, *prefix])
