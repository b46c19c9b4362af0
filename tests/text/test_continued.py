"""Tokenizers that put a space before a text add none between parts of a text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_sentencepiece import SCHEMES, tiny_sentencepiece
from tiny_tokenizer import tiny_tokenizer
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deepseek.text.chat_template import encode_chat, encode_prompt, render
from deepseek.text.tokenizer import (
    encode_continued,
    encode_plain,
    puts_space_before,
    tokenizer_digest,
)

TOKENIZERS = {scheme: tiny_sentencepiece(scheme) for scheme in SCHEMES}
MARKED = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
MARKED += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
words = st.lists(
    st.sampled_from(["a", "the", " ", "fine", "\n", "</s>", "<s>", "é", "  "]), max_size=8
).map("".join)
answers = st.lists(st.sampled_from(["a", "the", " fine", "fine", "é"]), min_size=1).map("".join)

each_scheme = pytest.mark.parametrize("scheme", SCHEMES)


def decoded(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


@each_scheme
@given(parts=st.lists(words, min_size=1, max_size=5))
def test_parts_decode_to_their_text(scheme: str, parts: list[str]) -> None:
    tokenizer = TOKENIZERS[scheme]
    first, *others = [part for part in parts if part] or ["a"]
    (ids,) = encode_plain(tokenizer, [first])
    for more in encode_continued(tokenizer, others):
        ids += more
    text = "".join([first, *others])
    # Metaspace adds no space to a text that begins with one, but its decoder strips it anyway.
    if scheme != "Prepend":
        text = text.removeprefix(" ")
    assert decoded(tokenizer, ids) == text


def test_a_continued_word_has_no_space() -> None:
    for tokenizer in TOKENIZERS.values():
        assert puts_space_before(tokenizer)
        tokens = [
            tokenizer.convert_ids_to_tokens(ids)
            for ids in encode_continued(tokenizer, ["fine", " fine"])
        ]
        assert tokens == [["fine"], ["▁fine"]]


@given(words)
def test_other_tokenizers_encode_as_before(text: str) -> None:
    tokenizer = tiny_tokenizer()
    assert not puts_space_before(tokenizer)
    assert encode_continued(tokenizer, [text]) == encode_plain(tokenizer, [text])


def test_a_byte_level_prefix_is_left_out_too() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=True)]
    )
    assert puts_space_before(tokenizer)
    (continued,) = encode_continued(tokenizer, ["the"])
    assert decoded(tokenizer, continued) == "the"


@each_scheme
@pytest.mark.parametrize("marked", [False, True])
@given(question=answers, answer=answers)
def test_a_conversation_has_the_ids_of_its_text(
    scheme: str, marked: bool, question: str, answer: str
) -> None:
    """Even if an answer follows a control token, as with Phi 3."""
    tokenizer = MARKED_TOKENIZERS[scheme] if marked else TOKENIZERS[scheme]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}] * 2
    whole = tokenizer(render(tokenizer, messages), add_special_tokens=False).input_ids
    chat = encode_chat(tokenizer, messages)
    assert chat.ids == whole
    targets = [token for token, target in zip(chat.ids, chat.is_target, strict=True) if target]
    if not marked:
        (expected,) = encode_continued(tokenizer, [answer])
        assert targets == [*expected, tokenizer.eos_token_id] * 2


MARKED_TOKENIZERS = {
    scheme: tiny_sentencepiece(scheme, ("<|user|>", "<|assistant|>"), MARKED) for scheme in SCHEMES
}


@each_scheme
@given(content=words)
def test_control_tokens_in_messages_get_no_spaces(scheme: str, content: str) -> None:
    tokenizer = TOKENIZERS[scheme]
    prompt = encode_prompt(tokenizer, [{"role": "user", "content": content}])
    assert prompt.count(tokenizer.eos_token_id) == 1
    assert decoded(tokenizer, prompt).startswith(f"<|user|>\n{content}</s>")


def test_the_digest_tells_that_parts_are_encoded_in_another_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Data that was stored with spaces between parts must not be reused."""
    tokenizers = [*TOKENIZERS.values(), tiny_tokenizer()]
    digests = [tokenizer_digest(tokenizer) for tokenizer in tokenizers]
    monkeypatch.setattr("deepseek.text.tokenizer.puts_space_before", lambda _: False)
    others = [tokenizer_digest(tokenizer) for tokenizer in tokenizers]
    same = [digest == other for digest, other in zip(digests, others, strict=True)]
    assert same == [False, False, False, True]
