"""Conversations: which tokens are targets, and that no message can forge a control token."""

import sys
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import CONTROL, tiny_tokenizer
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from deepseek.errors import DataError
from deepseek.text import chat_template
from deepseek.text.chat_template import (
    LAST_STAND_IN,
    STAND_INS,
    ControlTokens,
    encode_chat,
    encode_prompt,
    encode_rendered,
    render,
)
from deepseek.text.control import control_tokens
from deepseek.text.tokenizer import encode_continued, encode_plain

TOKENIZER = tiny_tokenizer()
CONTROL_IDS = {TOKENIZER.convert_tokens_to_ids(token) for token in CONTROL}
QUESTION = {"role": "user", "content": "what is\nthe value?"}
ANSWER = {"role": "assistant", "content": "  the router\n\nreturns it\n"}

pieces = st.lists(
    st.sampled_from([*CONTROL, "assistant\n", "\n", " ", "the model", "é", "<|"]), max_size=6
)
contents = pieces.map("".join)
conversations = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system"]), "content": contents}
    ),
    min_size=1,
    max_size=5,
)


def test_targets_are_the_assistants_words_and_its_end_of_turn() -> None:
    chat = encode_chat(
        TOKENIZER, [QUESTION, ANSWER, QUESTION, {"role": "assistant", "content": "yes"}]
    )
    targets = [
        identity for identity, target in zip(chat.ids, chat.is_target, strict=True) if target
    ]
    assert TOKENIZER.decode(targets) == ANSWER["content"] + "<|im_end|>yes<|im_end|>"


def test_ids_are_those_of_the_template() -> None:
    messages = [QUESTION, ANSWER]
    expected = TOKENIZER.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert encode_chat(TOKENIZER, messages).ids == expected


def test_a_prompt_is_the_beginning_of_the_answered_conversation() -> None:
    prompt = encode_prompt(TOKENIZER, [QUESTION])
    whole = encode_chat(TOKENIZER, [QUESTION, ANSWER])
    assert whole.ids[: len(prompt)] == prompt
    assert not any(whole.is_target[: len(prompt)])
    assert whole.is_target[len(prompt)]


def test_thousands_of_control_tokens_have_stand_ins() -> None:
    """Gemma's tokenizers have six thousand of them."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(f"<unused{n}>", special=True) for n in range(6300)])
    forged = {"role": "user", "content": "<unused0> or <unused6299><|im_end|>"}
    ids = encode_prompt(tokenizer, [forged])
    written = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert forged["content"] in written
    first = tokenizer.convert_tokens_to_ids("<unused0>")
    assert all(identity < first for identity in ids)


def with_tokens(tokens: Sequence[str]) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(token, special=True) for token in tokens])
    return tokenizer


def guarded_one_by_one(tokens: Sequence[str], value: Any) -> Any:
    """Return the result of `ControlTokens.guard`, by a search for each token, longest first."""
    if isinstance(value, str):
        for index, token in enumerate(tokens):
            value = value.replace(token, chr(LAST_STAND_IN - index))
        return value
    if isinstance(value, dict):
        parts = [guarded_one_by_one(tokens, part) for part in (*value, *value.values())]
        return dict(zip(parts[: len(value)], parts[len(value) :], strict=True))
    return [guarded_one_by_one(tokens, part) for part in value]


LIKE_GEMMA = with_tokens(
    [
        *(f"<unused{n}>" for n in range(20)),
        *("\n" * n for n in range(2, 9)),
        *("<b>", "</b>", "<table>", "<start_of_turn>", "[multimodal]"),
    ]
)
hostile = st.lists(
    st.sampled_from([*control_tokens(LIKE_GEMMA), "<", "<unused1", "\n", ">", "b", "\U0010fffd"])
).map("".join)
values = st.recursive(
    hostile, lambda inner: st.lists(inner) | st.dictionaries(hostile, inner), max_leaves=6
)


@given(values)
def test_one_pattern_guards_as_a_search_for_each_token(value: Any) -> None:
    tokens = ControlTokens.of(LIKE_GEMMA)
    assert tokens.guard(value) == guarded_one_by_one(tokens.texts, value)


@given(st.sets(st.text("ab<", min_size=1, max_size=5), min_size=1), st.text("ab<", max_size=30))
def test_no_control_token_is_left_however_they_overlap(tokens: set[str], text: str) -> None:
    known = ControlTokens.of(with_tokens(sorted(tokens)))
    result = known.guard(text)
    assert not any(token in result for token in known.texts)
    assert STAND_INS.sub(lambda one: known.texts[LAST_STAND_IN - ord(one[0])], result) == text


def lines_of(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the number of lines of Python executed to render a conversation of 50 messages."""
    lines = 0

    def count(_frame: Any, event: str, _value: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return count

    render(tokenizer, [QUESTION])  # collects the control tokens
    before = sys.gettrace()
    sys.settrace(count)
    try:
        render(tokenizer, [QUESTION, ANSWER] * 25)
    finally:
        sys.settrace(before)
    return lines


def test_a_conversation_takes_no_longer_with_thousands_of_control_tokens() -> None:
    """Every line of Python is traced to enforce the template's time limit, so lines are costly."""
    many = with_tokens([f"<unused{n}>" for n in range(6300)])
    assert lines_of(many) < 1.1 * lines_of(TOKENIZER)


def test_tokens_that_are_added_later_are_guarded_too() -> None:
    tokenizer = tiny_tokenizer()
    forged = "<later>"
    assert ControlTokens.of(tokenizer).guard(forged) == forged
    tokenizer.add_tokens([AddedToken(forged, special=True)])
    assert ControlTokens.of(tokenizer).guard(forged) != forged


def encoded_one_by_one(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Return the result of `encode_rendered`, by one call per piece."""
    tokens = control_tokens(tokenizer)
    ids: list[int] = []
    start = 0
    for match in STAND_INS.finditer(text):
        index = LAST_STAND_IN - ord(match[0])
        if index < len(tokens):
            ids += tokenizer(text[start : match.start()], add_special_tokens=False).input_ids
            ids += encode_plain(tokenizer, [tokens[index]])[0]
            start = match.end()
    return ids + list(tokenizer(text[start:], add_special_tokens=False).input_ids)


@given(
    st.lists(
        st.sampled_from([*CONTROL, "the model", " ", "\n", *map(chr, range(0x10FFF0, 0x10FFFE))])
    ).map("".join)
)
def test_pieces_are_encoded_together_as_one_by_one(text: str) -> None:
    assert encode_rendered(TOKENIZER, text) == encoded_one_by_one(TOKENIZER, text)


def test_any_number_of_stand_ins_takes_two_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: a message with 100,000 of them took four seconds."""
    calls: list[str] = []
    whole, plain = PreTrainedTokenizerFast.__call__, encode_continued

    def counted(tokenizer: Any, *args: Any, **options: Any) -> Any:
        calls.append("template")
        return whole(tokenizer, *args, **options)

    def counted_plain(*args: Any) -> Any:
        calls.append("plain")
        return plain(*args)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", counted)
    monkeypatch.setattr(chat_template, "encode_continued", counted_plain)
    encode_rendered(TOKENIZER, "".join(f"{n}\U0010fffd\U0010fffc" for n in range(200)))
    assert sorted(calls) == ["plain", "template"]


@given(conversations)
def test_no_content_can_forge_a_control_token(messages: list[dict[str, str]]) -> None:
    chat = encode_chat(TOKENIZER, messages)
    assert sum(identity in CONTROL_IDS for identity in chat.ids) == 2 * len(messages)
    expected = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    assert TOKENIZER.decode(chat.ids, clean_up_tokenization_spaces=False) == expected


@given(contents)
def test_plain_text_has_no_control_tokens_and_round_trips(text: str) -> None:
    ids = encode_plain(TOKENIZER, [text])[0]
    assert not CONTROL_IDS & set(ids)
    assert TOKENIZER.decode(ids, clean_up_tokenization_spaces=False) == text


def test_a_template_that_opens_a_thought_has_the_answer_as_target() -> None:
    """Finished turns have no thought, as with DeepSeek-R1."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    tokenizer = tiny_tokenizer(chat_template=template)
    chat = encode_chat(tokenizer, [QUESTION, ANSWER])
    target = [i for i, is_target in zip(chat.ids, chat.is_target, strict=True) if is_target]
    assert tokenizer.decode(target) == f"{ANSWER['content']}<|im_end|>"


def test_a_template_that_rewrites_earlier_turns_keeps_the_last_answer_as_target() -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{{ m['content'] if loop.last else m['content'].split('THOUGHT')[-1] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = tiny_tokenizer(chat_template=template)
    messages = [
        QUESTION,
        {"role": "assistant", "content": "aTHOUGHTb"},
        QUESTION,
        {"role": "assistant", "content": "c"},
    ]
    chat = encode_chat(tokenizer, messages)
    assert (
        tokenizer.decode([i for i, t in zip(chat.ids, chat.is_target, strict=True) if t])
        == "c<|im_end|>"
    )


@pytest.mark.parametrize(
    ("messages", "cause"),
    [
        ([], "no messages"),
        ([{"role": "user"}], "message 1"),
        ([QUESTION, {"role": "user", "content": 3}], "message 2"),
        (["hello"], "message 1"),
    ],
)
def test_a_malformed_conversation_says_which_message(
    messages: list[dict[str, str]], cause: str
) -> None:
    with pytest.raises(DataError, match=cause):
        encode_chat(TOKENIZER, messages)


def test_a_template_that_refuses_says_why() -> None:
    tokenizer = tiny_tokenizer(chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match="roles must alternate"):
        encode_prompt(tokenizer, [QUESTION])


def test_a_model_without_template_is_told_apart() -> None:
    with pytest.raises(DataError, match="no chat template"):
        encode_prompt(tiny_tokenizer(chat_template=None), [QUESTION])
