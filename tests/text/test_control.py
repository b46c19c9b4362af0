"""Control tokens that a tokenizer does not flag as special cannot be written in a text either."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import CHATML, tiny_tokenizer
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from deepseek.text.chat_template import encode_chat, encode_prompt, render
from deepseek.text.control import FIM_TOKENS, control_tokens, unflagged_control_tokens
from deepseek.text.infilling import infill_layout
from deepseek.text.tokenizer import encode_plain, tokenizer_digest

TOOLS = "{% if tools %}Answer with <tool_call>...</tool_call>.\n\n{% endif %}"
STRIPPED = CHATML.replace("message['content'] }}", "message['content'].split('</think>')[-1] }}")
UNFLAGGED = ("<tool_call>", "</tool_call>", *FIM_TOKENS[0])
ORDINARY = ("<table>", "\n\n", "tools", "<think>", "</think>")


def like_qwen(template: str | None = TOOLS + STRIPPED) -> PreTrainedTokenizerFast:
    """Return a tokenizer with added tokens that are not flagged as special, like Qwen's."""
    tokenizer = tiny_tokenizer(chat_template=template)
    tokenizer.add_tokens([AddedToken(text, special=False) for text in (*UNFLAGGED, *ORDINARY)])
    return tokenizer


QWEN = like_qwen()
UNFLAGGED_IDS = {QWEN.convert_tokens_to_ids(text) for text in UNFLAGGED}
texts = st.lists(st.sampled_from([*UNFLAGGED, *ORDINARY, "the model", " ", "<", "é"])).map("".join)


@given(texts)
def test_texts_hold_no_markers_and_come_back(text: str) -> None:
    (ids,) = encode_plain(QWEN, [text])
    assert not UNFLAGGED_IDS & set(ids)
    assert QWEN.decode(ids, clean_up_tokenization_spaces=False) == text


@given(texts)
def test_messages_hold_no_markers_and_come_back(text: str) -> None:
    prompt = encode_prompt(QWEN, [{"role": "user", "content": text}])
    assert not UNFLAGGED_IDS & set(prompt)
    written = QWEN.decode(prompt, clean_up_tokenization_spaces=False)
    assert f"user\n{text.split('</think>')[-1]}<|im_end|>" in written


@pytest.mark.parametrize("text", ORDINARY)
def test_other_added_tokens_are_ordinary_text(text: str) -> None:
    assert encode_plain(QWEN, [text]) == [[QWEN.convert_tokens_to_ids(text)]]


def test_which_tokens_count_depends_on_the_template() -> None:
    assert {*unflagged_control_tokens(QWEN)} == {*UNFLAGGED}
    other = like_qwen(CHATML)
    assert {*unflagged_control_tokens(other)} == {*FIM_TOKENS[0]}
    other.chat_template = {"default": CHATML, "tool_use": TOOLS + CHATML}
    assert {*unflagged_control_tokens(other)} == {*UNFLAGGED}
    other.chat_template = None
    other.add_tokens([AddedToken("<later>", special=True)])
    assert "<later>" in control_tokens(other)
    assert "<later>" not in unflagged_control_tokens(other)


def test_the_templates_own_markers_are_control_tokens() -> None:
    text = render(QWEN, [{"role": "user", "content": "<tool_call>"}], tools=[{"name": "f"}])
    assert "<tool_call>...</tool_call>" in text
    assert text.count("<tool_call>") == 1


def test_a_template_finds_the_end_of_a_thought() -> None:
    messages = [
        {"role": "user", "content": "why?"},
        {"role": "assistant", "content": "<think>the model</think>yes"},
    ]
    written = QWEN.decode(encode_chat(QWEN, messages).ids, clean_up_tokenization_spaces=False)
    assert "the model" not in written
    assert "yes" in written


def test_a_layout_inserts_real_markers_that_are_not_flagged() -> None:
    layout = infill_layout(QWEN)
    assert layout.has_tokens
    assert layout.join([], []) == [QWEN.convert_tokens_to_ids(text) for text in FIM_TOKENS[0]]


def test_the_digest_tells_of_tokens_that_count_though_not_flagged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Data that was stored with these tokens in texts must not be reused."""
    tokenizers = [QWEN, tiny_tokenizer(FIM_TOKENS[0])]
    digests = [tokenizer_digest(tokenizer) for tokenizer in tokenizers]
    monkeypatch.setattr("deepseek.text.tokenizer.unflagged_control_tokens", lambda _: [])
    others = [tokenizer_digest(tokenizer) for tokenizer in tokenizers]
    same = [digest == other for digest, other in zip(digests, others, strict=True)]
    assert same == [False, True]
