"""A prompt that is encoded in parts has no spaces between them, even with tokenizers that put a
space before a text.
"""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_sentencepiece import SCHEMES, tiny_sentencepiece
from tiny_tokenizer import tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from deepseek.data import Document
from deepseek.retrieval.index import Index
from deepseek.server.errors import ApiError
from deepseek.server.prompt import EditorGap, PromptWriter
from deepseek.server.retrieve import Retrieval
from deepseek.server.schema import ChatMessage
from deepseek.server.tools import Calling
from deepseek.text.control import FIM_TOKENS
from deepseek.text.infilling import encode_around_gap, infill_layout
from deepseek.text.tokenizer import encode_plain, puts_space_before

SPACED = [tiny_sentencepiece(scheme) for scheme in SCHEMES]
SPACED_WITH_TOKENS = [tiny_sentencepiece(scheme, FIM_TOKENS[1]) for scheme in SCHEMES]
BYTE_LEVEL = [tiny_tokenizer(), tiny_tokenizer(FIM_TOKENS[1])]
PASSAGE = "file: a.py\n\nthe router = 1\n\n"
"""Text before a prompt that retrieves the only passage of `INDEX`."""
INDEX = Index.build([Document("the router = 1\n", "a.py", "code")])
texts = st.text("ae the(\n", max_size=12)


def test_a_conversation_of_which_a_template_writes_nothing_is_refused() -> None:
    """Many templates write nothing for a system turn alone."""
    template = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    writer = PromptWriter(tiny_tokenizer(chat_template=template), 99)
    with pytest.raises(ApiError, match="prompt is empty") as refusal:
        writer.chat([ChatMessage(role="system", content="a")], Calling())
    assert (refusal.value.status, refusal.value.param) == (400, "messages")


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_reasoning_of_an_earlier_turn_is_left_out(field: str) -> None:
    """Templates of models that reason write it into the prompt, at least of the last turn."""
    template = f"{{% for m in messages %}}{{{{ m['content'] }}}}{{{{ m.get('{field}') }}}}{{% endfor %}}{{{{ tools }}}}"
    writer = PromptWriter(tiny_tokenizer(chat_template=template), 99)
    assert writer.knows_tools
    turn = {"role": "assistant", "content": "the value"}
    plain = writer.chat([ChatMessage(**turn)], Calling())
    assert writer.chat([ChatMessage(**turn, **{field: "the router"})], Calling()) == plain


def decoded(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def with_passages(tokenizer: PreTrainedTokenizerFast, prompt: str | list[int]) -> list[int]:
    """Return the ids of a plain prompt with its retrieved passages before it."""
    writer = PromptWriter(tokenizer, 999)
    service: Any = SimpleNamespace(engine=SimpleNamespace(tokenizer=tokenizer), writer=writer)
    text = prompt if isinstance(prompt, str) else ""
    ids, passages = Retrieval([INDEX], 1).before(writer.text(prompt), service, 9, text)
    assert len(passages) == 1
    return ids


@pytest.mark.parametrize("tokenizer", [*SPACED, *SPACED_WITH_TOKENS, *BYTE_LEVEL])
@given(prefix=texts, line=texts, suffix=texts)
def test_a_gap_is_the_text_of_the_editor(
    tokenizer: PreTrainedTokenizerFast, prefix: str, line: str, suffix: str
) -> None:
    ids = PromptWriter(tokenizer, 999).gap(EditorGap(prefix, line, suffix), 9)
    if infill_layout(tokenizer).has_tokens:
        written = f"<fim_suffix>{suffix}<fim_middle>{line}"
        assert decoded(tokenizer, ids).endswith(f"{prefix}{written}")
    else:
        assert decoded(tokenizer, ids) == f"<fim_suffix>{suffix}<fim_prefix>{prefix}{line}"


@pytest.mark.parametrize("tokenizer", BYTE_LEVEL)
@given(prefix=texts, line=texts, suffix=texts)
def test_byte_level_tokenizers_encode_the_parts_of_a_gap_plainly(
    tokenizer: PreTrainedTokenizerFast, prefix: str, line: str, suffix: str
) -> None:
    """The cursor's line is a part of its own only if the suffix may come before it."""
    assert not puts_space_before(tokenizer)
    layout = infill_layout(tokenizer)
    parts = (prefix, line) if layout.has_tokens else (prefix + line, "")
    before, line_ids, after = encode_plain(tokenizer, [*parts, suffix])
    around = encode_around_gap(tokenizer, layout, parts[0], suffix)
    assert (around.prefix, around.suffix) == (before, after)
    expected = [*layout.join(before, after), *line_ids]
    assert PromptWriter(tokenizer, 999).gap(EditorGap(prefix, line, suffix), 9) == expected
    if not layout.has_tokens:
        markers = [layout.prefix, layout.suffix, layout.middle]
        assert markers == encode_plain(tokenizer, FIM_TOKENS[1])


@pytest.mark.parametrize("tokenizer", [*SPACED, *BYTE_LEVEL])
@given(prompt=st.text("ae (\n", max_size=12).map("{}the router".format))
def test_passages_put_no_space_before_the_prompt(
    tokenizer: PreTrainedTokenizerFast, prompt: str
) -> None:
    assert decoded(tokenizer, with_passages(tokenizer, prompt)) == f"{PASSAGE}{prompt}"


@pytest.mark.parametrize("tokenizer", [*SPACED, *BYTE_LEVEL])
def test_ids_of_a_prompt_stay_and_control_tokens_stay_tokens(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    text = f"the router{tokenizer.eos_token}a"
    ids = list(tokenizer(text).input_ids)
    assert with_passages(tokenizer, ids)[-len(ids) :] == ids
    retrieved = with_passages(tokenizer, text)
    assert retrieved.count(tokenizer.eos_token_id) == 1
    if not puts_space_before(tokenizer):
        assert retrieved == with_passages(tokenizer, ids)
