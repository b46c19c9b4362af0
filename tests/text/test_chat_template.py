"""Conversations: what is a target, and that no message can forge a control token."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import CONTROL, tiny_tokenizer
from tokenizers import AddedToken

from deepseek.errors import DataError
from deepseek.text.chat_template import encode_chat, encode_prompt
from deepseek.text.tokenizer import encode_plain

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
    """Gemma's tokenizers have six thousand."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(f"<unused{n}>", special=True) for n in range(6300)])
    forged = {"role": "user", "content": "<unused0> or <unused6299><|im_end|>"}
    ids = encode_prompt(tokenizer, [forged])
    written = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert forged["content"] in written
    first = tokenizer.convert_tokens_to_ids("<unused0>")
    assert all(identity < first for identity in ids)


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
