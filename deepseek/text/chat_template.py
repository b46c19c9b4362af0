"""Chat templates: encode a conversation as token ids and a loss mask.

The model's own chat template runs in the Jinja sandbox of `transformers`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from inspect import signature
from os.path import commonprefix
from typing import Any

from transformers import PreTrainedTokenizerFast

from deepseek.errors import DataError, UserError, shown
from deepseek.text.messages import Message, check_messages
from deepseek.text.tokenizer import encode_plain

USER_ROLES = ("user", "tool")

LAST_STAND_IN = 0x10FFFD
"""Last code point of plane 16, which is for private use. The first control token has this one as
its stand-in (see `render`), the next one that before it, and so on: texts hardly ever use them.
"""

RESERVED = {
    *signature(PreTrainedTokenizerFast.apply_chat_template).parameters,
    "messages",
    "raise_exception",
    "strftime_now",
}
"""Names that a template's variables cannot have."""

STAND_INS = re.compile(f"[{chr(0x100000)}-{chr(LAST_STAND_IN)}]")

NOTHING = "(?!)"
"""A regular expression that never matches."""


@dataclass(frozen=True)
class EncodedChat:
    """A whole conversation as token ids with a loss mask.

    Attributes:
        ids: token ids.
        is_target: whether the assistant wrote each token.
    """

    ids: list[int]
    is_target: list[bool]


def render(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Message],
    open_turn: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """Return the conversation as text, rendered by the chat template.

    Control tokens inside messages and tools are replaced by private-use characters, so that content
    cannot end a turn or start another one. `encode_rendered` turns them back into ordinary
    characters.

    Args:
        tokenizer: tokenizer with a chat template.
        messages: the conversation.
        open_turn: whether to append the start of the assistant's answer (default: False).
        tools: descriptions of tools for templates that support them; None: no tools.
        variables: further variables that a template may read, such as `enable_thinking`; default:
            none.

    Raises:
        DataError: a message is malformed, a variable has the name of an argument, there is no chat
            template, or the template refuses the messages.
        UserError: one that the caller's trace function raises goes through.
    """
    check_messages(messages)
    taken = sorted(RESERVED & (variables or {}).keys())
    if taken:
        raise DataError(f"Chat templates have no variable {shown(taken[0])}; leave it out.")
    if tokenizer.chat_template is None:
        raise DataError(
            "The model has no chat template; use an instruct model or give plain text instead of "
            "messages."
        )
    guard = ControlTokens.of(tokenizer).guard
    try:
        text = tokenizer.apply_chat_template(
            guard(messages),
            tools=guard(tools),
            tokenize=False,
            add_generation_prompt=open_turn,
            **guard(variables or {}),
        )
    except UserError:  # a time limit of the caller
        raise
    except Exception as error:  # a template can do anything that an expression in Jinja can
        raise DataError(
            f"The chat template refuses these messages ({error}); check their roles and order."
        ) from error
    return str(text)


@dataclass(frozen=True)
class ControlTokens:
    """The added tokens of a tokenizer.

    Attributes:
        texts: their texts, longest first.
        pattern: finds them; of several that begin at the same place, it takes the longest.
        stand_ins: the character that stands in for each (see `render`).
    """

    texts: tuple[str, ...]
    pattern: re.Pattern[str]
    stand_ins: Mapping[str, str]

    @staticmethod
    def of(tokenizer: PreTrainedTokenizerFast) -> "ControlTokens":
        """Return the control tokens of a tokenizer; they are collected once."""
        return _control_tokens(tokenizer, len(tokenizer))

    def guard(self, value: Any) -> Any:
        """Return a value with every control token in its texts replaced by its stand-in.

        None is left: where two overlap, the one that begins first is replaced.

        Args:
            value: text, or nested mappings and lists with texts.
        """
        if isinstance(value, str):
            return self.pattern.sub(lambda found: self.stand_ins[found[0]], value)
        if isinstance(value, Mapping):
            return {self.guard(name): self.guard(part) for name, part in value.items()}
        return [self.guard(part) for part in value] if isinstance(value, list | tuple) else value


@lru_cache(maxsize=4)
def _control_tokens(tokenizer: PreTrainedTokenizerFast, _size: int) -> ControlTokens:
    """Return the control tokens of a tokenizer.

    Args:
        tokenizer: the tokenizer.
        _size: number of its tokens, with which the result is cached: some may be added later.
    """
    texts = sorted(tokenizer.get_added_vocab(), key=lambda token: (-len(token), token))
    stand_ins = {text: chr(LAST_STAND_IN - index) for index, text in enumerate(texts)}
    pattern = re.compile(_any_of(texts) if texts else NOTHING)
    return ControlTokens(tuple(texts), pattern, stand_ins)


def _any_of(texts: Iterable[str]) -> str:
    """Return a regular expression that matches the longest of some texts.

    It is a tree: texts that begin alike share a branch. A plain list of Gemma's six thousand tokens
    would be tried one by one at each "<".

    Args:
        texts: the texts; an empty one makes the others optional.
    """
    groups: dict[str, list[str]] = {}
    for text in texts:
        groups.setdefault(text[:1], []).append(text)
    is_optional = groups.pop("", None) is not None
    branches: list[str] = []
    for group in groups.values():
        start = commonprefix(group)  # noqa: RUF071 - of characters, as it should be
        branches.append(re.escape(start) + _any_of(text[len(start) :] for text in group))
    if not branches:
        return ""
    return f"(?:{'|'.join(branches)})" + ("?" if is_optional else "")


def control_tokens(tokenizer: PreTrainedTokenizerFast) -> Sequence[str]:
    """Return the texts of all added tokens, longest first."""
    return ControlTokens.of(tokenizer).texts


def encode_rendered(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Return the ids of a text from `render`.

    Control tokens of the template become control tokens. Stand-ins become the ordinary characters
    of the token that they replaced.
    """
    tokens = control_tokens(tokenizer)
    pieces: list[str] = []
    replaced: list[str] = []  # the token between each piece and the next one
    start = 0
    for match in STAND_INS.finditer(text):
        index = LAST_STAND_IN - ord(match[0])
        if index < len(tokens):
            pieces.append(text[start : match.start()])
            replaced.append(tokens[index])
            start = match.end()
    pieces.append(text[start:])
    # Each text is encoded once, and all in one call: a message can hold any number of stand-ins.
    distinct = list(dict.fromkeys(pieces))
    encoded = tokenizer(distinct, add_special_tokens=False, return_attention_mask=False).input_ids
    piece_ids = dict(zip(distinct, encoded, strict=True))
    plain = list(dict.fromkeys(replaced))
    plain_ids = dict(zip(plain, encode_plain(tokenizer, plain), strict=True))
    ids = list(piece_ids[pieces[0]])
    for token, piece in zip(replaced, pieces[1:], strict=True):
        ids += plain_ids[token]
        ids += piece_ids[piece]
    return ids


def encode_prompt(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message]) -> list[int]:
    """Return the ids of a prompt that ends where the assistant's answer starts."""
    return encode_rendered(tokenizer, render(tokenizer, messages, open_turn=True))


def user_ids(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message]) -> tuple[int, ...]:
    """Return the ids of the user's messages and tool results, by which relevance is scored.

    The template, the system prompt and the assistant's answers are left out, because they are no
    evidence of what the user asks about.
    """
    texts = [str(message["content"]) for message in messages if message["role"] in USER_ROLES]
    return tuple(encode_plain(tokenizer, ["\n".join(texts)])[0])


def encode_chat(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message]) -> EncodedChat:
    """Return a finished conversation with the assistant's turns as targets.

    A target turn is the text that the template adds after the open turn, including the end-of-turn
    token. Some templates rewrite earlier turns (those of reasoning models drop old thoughts), so
    that their boundaries cannot be found. Such turns are context only.
    """
    whole = render(tokenizer, messages)
    ids: list[int] = []
    is_target: list[bool] = []
    for text, target in turns(tokenizer, messages, whole):
        part = encode_rendered(tokenizer, text)
        ids += part
        is_target += [target] * len(part)
    return EncodedChat(ids, is_target)


def turns(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], whole: str
) -> list[tuple[str, bool]]:
    """Split a rendered conversation into parts (text, whether the assistant wrote it).

    Args:
        tokenizer: tokenizer with a chat template.
        messages: the conversation.
        whole: the rendered conversation; the parts concatenate to it.
    """
    parts: list[tuple[str, bool]] = []
    position = 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index == 0:
            continue
        before = render(tokenizer, messages[:index], open_turn=True)
        after = render(tokenizer, messages[: index + 1])
        if not (whole.startswith(before) and whole.startswith(after) and len(before) >= position):
            continue
        answer = after[len(before) :]
        # The line break that the template writes after a turn is not part of the answer.
        end = len(before) + len(answer.rstrip("\n"))
        parts += [(whole[position : len(before)], False), (whole[len(before) : end], True)]
        position = end
    return [part for part in [*parts, (whole[position:], False)] if part[0]]
