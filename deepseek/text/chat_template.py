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
from deepseek.text.control import control_tokens
from deepseek.text.messages import Message, check_messages
from deepseek.text.tokenizer import encode_continued, encode_plain

USER_ROLES = ("user", "tool")

LAST_STAND_IN = 0x10FFFD
"""Last private-use code point of plane 16, the stand-in of the first control token (see `render`);
the next token has the one before it, and so on. Texts hardly ever use them.
"""

RESERVED_VARIABLES = {
    *signature(PreTrainedTokenizerFast.apply_chat_template).parameters,
    "messages",
    "raise_exception",
    "strftime_now",
}
"""Names that a template's variables cannot have."""

STAND_INS = re.compile(f"[{chr(0x100000)}-{chr(LAST_STAND_IN)}]")

MATCHES_NOTHING = "(?!)"
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


def check_variables(variables: Mapping[str, Any]) -> None:
    """Raise `DataError` for a variable that has the name of an argument of the template."""
    reserved_names = sorted(RESERVED_VARIABLES & variables.keys())
    if reserved_names:
        raise DataError(
            f"Chat templates have no variable {shown(reserved_names[0])}; leave it out."
        )


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
        UserError: raised by the caller's trace function, and passed on.
    """
    check_messages(messages)
    check_variables(variables or {})
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
    except Exception as error:  # a template can evaluate any Jinja expression
        raise DataError(
            f"The chat template refuses these messages ({error}); check their roles and order."
        ) from error
    return str(text)


@dataclass(frozen=True)
class ControlTokens:
    """The control tokens of a tokenizer (see `text.control`).

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
        """Return the control tokens of a tokenizer; their pattern is compiled once."""
        return _stood_in_for(control_tokens(tokenizer))

    def guard(self, value: Any) -> Any:
        """Return a value with every control token in its texts replaced by its stand-in.

        No control token is left: of two that overlap, the one that begins first is replaced.

        Args:
            value: text, or nested mappings and lists with texts.
        """
        if isinstance(value, str):
            return self.pattern.sub(lambda match: self.stand_ins[match[0]], value)
        if isinstance(value, Mapping):
            return {self.guard(name): self.guard(part) for name, part in value.items()}
        return [self.guard(part) for part in value] if isinstance(value, list | tuple) else value


@lru_cache(maxsize=4)
def _stood_in_for(texts: tuple[str, ...]) -> ControlTokens:
    """Return control tokens with their pattern and stand-ins.

    Args:
        texts: their texts, longest first.
    """
    stand_ins = {text: chr(LAST_STAND_IN - index) for index, text in enumerate(texts)}
    pattern = re.compile(_any_of(texts) if texts else MATCHES_NOTHING)
    return ControlTokens(texts, pattern, stand_ins)


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


def encode_rendered(
    tokenizer: PreTrainedTokenizerFast, text: str, previous: int | None = None
) -> list[int]:
    """Return the ids of a text from `render`.

    Control tokens of the template become control tokens. Stand-ins become the ordinary characters
    of the token that they replaced. The ids are those that the tokenizer gives for the whole text,
    up to merges across the places where it is split.

    Args:
        tokenizer: the tokenizer.
        text: the text, or a part of it.
        previous: the token before the part; None: it is the beginning.
    """
    control = ControlTokens.of(tokenizer)
    previous_token = "" if previous is None else str(tokenizer.convert_ids_to_tokens(previous))
    is_continued = previous is not None and previous_token not in control.stand_ins
    # The tokenizer itself decides whether a space belongs after a control token, so it gets the
    # token, too.
    parts = _split_rendered(control, text if is_continued else previous_token + text, is_continued)
    # Each text is encoded once, and all of a kind in one call: a message can hold any number of
    # stand-ins.
    texts = list(dict.fromkeys(part.text for part in parts if not part.is_plain))
    plain_texts = list(dict.fromkeys(part.text for part in parts if part.is_plain))
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False).input_ids
    ids_of = {
        False: dict(zip(texts, encoded, strict=True)),
        True: dict(zip(plain_texts, encode_continued(tokenizer, plain_texts), strict=True)),
    }
    ids: list[int] = []
    for part in parts:
        ids += ids_of[part.is_plain][part.text]
    return ids[1:] if previous_token and not is_continued else ids


@dataclass(frozen=True)
class _RenderedPart:
    """A part of a rendered text that is encoded on its own.

    Attributes:
        text: the part.
        is_plain: whether it continues other text and holds no control token of the template;
            otherwise it is the beginning of the text, or begins with a control token.
    """

    text: str
    is_plain: bool


def _split_rendered(control: ControlTokens, text: str, is_continued: bool) -> list[_RenderedPart]:
    """Split a rendered text at its stand-ins, and after each at the next control token.

    At least one part is not plain; parts may be empty.

    Args:
        control: the control tokens.
        text: the text.
        is_continued: whether it continues other text.
    """
    parts: list[_RenderedPart] = []
    start = 0
    follows_text = is_continued
    for match in STAND_INS.finditer(text):
        index = LAST_STAND_IN - ord(match[0])
        if index < len(control.texts):
            parts += _split_piece(control, text[start : match.start()], follows_text)
            parts.append(_RenderedPart(control.texts[index], True))
            start = match.end()
            follows_text = True
    return parts + _split_piece(control, text[start:], follows_text)


def _split_piece(control: ControlTokens, piece: str, follows_text: bool) -> list[_RenderedPart]:
    """Split a piece of a rendered text without stand-ins where its first control token begins.

    The last part is never plain, but may be empty.

    Args:
        control: the control tokens.
        piece: the text.
        follows_text: whether it continues other text; otherwise it is left whole.
    """
    if not follows_text:
        return [_RenderedPart(piece, False)]
    match = control.pattern.search(piece)
    split = match.start() if match else len(piece)
    return [_RenderedPart(piece[:split], True), _RenderedPart(piece[split:], False)]


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
    rendered_text = render(tokenizer, messages)
    ids: list[int] = []
    is_target: list[bool] = []
    for text, target in turns(tokenizer, messages, rendered_text):
        part = encode_rendered(tokenizer, text, ids[-1] if ids else None)
        ids += part
        is_target += [target] * len(part)
    return EncodedChat(ids, is_target)


def turns(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], rendered_text: str
) -> list[tuple[str, bool]]:
    """Split a rendered conversation into parts (text, whether the assistant wrote it).

    Args:
        tokenizer: tokenizer with a chat template.
        messages: the conversation.
        rendered_text: the rendered conversation; the parts concatenate to it.
    """
    parts: list[tuple[str, bool]] = []
    position = 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index == 0:
            continue
        before = render(tokenizer, messages[:index], open_turn=True)
        after = render(tokenizer, messages[: index + 1])
        start = len(before)
        if not after.startswith(before):
            # Templates of reasoning models open a thought that a finished turn does not have.
            start = len(commonprefix([before, after]))  # noqa: RUF071 - of characters, too
            if start <= len(render(tokenizer, messages[:index])):
                continue
        if not rendered_text.startswith(after) or start < position:
            continue
        # The line break that the template writes after a turn is not part of the answer.
        end = start + len(after[start:].rstrip("\n"))
        parts += [(rendered_text[position:start], False), (rendered_text[start:end], True)]
        position = end
    return [part for part in [*parts, (rendered_text[position:], False)] if part[0]]
