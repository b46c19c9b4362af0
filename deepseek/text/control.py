"""Control tokens, which chat templates and training layouts may write and user text may not."""

from functools import lru_cache
from itertools import chain

from transformers import PreTrainedTokenizerFast

FIM_TOKENS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
)
"""Fill-in-the-middle tokens (prefix, suffix, middle) of model families; the second is
StarCoder's.
"""

REASONING_TOKENS = ("<think>", "</think>")
"""Tokens around a reasoning model's thoughts. They count as text unless they are special: templates
such as Qwen3's look for `</think>` in the assistant's messages to drop earlier thoughts, and would
not find a stand-in (see `chat_template.render`).
"""


def control_tokens(tokenizer: PreTrainedTokenizerFast) -> tuple[str, ...]:
    """Return the texts of a tokenizer's control tokens, longest first.

    These are its special tokens, and those added tokens that are fill-in-the-middle markers or
    occur in its chat template: Qwen's `<|fim_prefix|>` and `<tool_call>` are not flagged as
    special. Other added tokens, such as Gemma's line breaks and HTML tags, are ordinary text.

    Args:
        tokenizer: the tokenizer; tokens that are added to it later are seen.
    """
    return _control_tokens(tokenizer, len(tokenizer), _template_text(tokenizer))


def unflagged_control_tokens(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Return the control tokens that the tokenizer itself does not flag as special."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return [text for text in control_tokens(tokenizer) if text not in special]


@lru_cache(maxsize=4)
def _control_tokens(
    tokenizer: PreTrainedTokenizerFast, _size: int, template: str
) -> tuple[str, ...]:
    """Return the texts of the control tokens, longest first.

    Args:
        tokenizer: the tokenizer.
        _size: number of its tokens, with which the result is cached.
        template: source of its chat templates.
    """
    markers = set(chain.from_iterable(FIM_TOKENS))
    texts = {
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special
        or token.content in markers
        or (_is_marker(token.content) and token.content in template)
    }
    return tuple(sorted(texts, key=lambda text: (-len(text), text)))


def _is_marker(text: str) -> bool:
    """Return whether an added token can be a marker of a chat template.

    Line breaks, spaces and plain words occur in the source of a template by chance.
    """
    has_letter = any(character.isalnum() for character in text)
    has_sign = any(not character.isalnum() and not character.isspace() for character in text)
    return has_letter and has_sign and text not in REASONING_TOKENS


def _template_text(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the source of a tokenizer's chat template, or of all if it has several."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        return "\n".join(template.values())
    return template or ""
