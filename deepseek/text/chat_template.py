"""Conversations: messages to ids and a loss mask, with the model's own chat template (transformers'
jinja sandbox).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerFast

from deepseek.errors import DataError
from deepseek.text.tokenizer import encode_plain

Message = Mapping[str, Any]
"""`{"role": "system" | "user" | "assistant", "content": text}`; templates that know tools read
further fields.
"""

USER_ROLES = ("user", "tool")

FIRST_STAND_IN = 0x10F000
"""Start of a private-use range; see `render`."""

STAND_INS = re.compile(f"[{chr(FIRST_STAND_IN)}-{chr(0x10FFFF)}]")


@dataclass(frozen=True)
class EncodedChat:
    """Ids of a whole conversation; `is_target[t]` says whether token t was written by the
    assistant.
    """

    ids: list[int]
    is_target: list[bool]


def check_messages(messages: Sequence[Message], where: str = "The conversation") -> None:
    """Raise `DataError`, saying `where`, unless there are messages and every one has a role and a
    text.
    """
    if not messages:
        raise DataError(f"{where} has no messages; give at least one with a role and a content.")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not all(
            isinstance(message.get(k), str) for k in ("role", "content")
        ):
            raise DataError(
                f"{where}: message {number} needs a text role and a text content; it is {message!r:.80}."
            )


def render(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Message],
    open_turn: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """Return the conversation as the template writes it; `open_turn` adds the start of the
    assistant's answer.

    Control tokens inside messages and tools are replaced by private-use characters, one for each,
    so that nobody can end a turn or begin another from within; `encode_rendered` writes them back
    as ordinary characters.
    """
    check_messages(messages)
    if tokenizer.chat_template is None:
        raise DataError(
            "The model has no chat template; use an instruct model or give plain text instead of messages."
        )
    tokens = control_tokens(tokenizer)
    try:
        text = tokenizer.apply_chat_template(
            guard(tokens, messages),
            tools=guard(tokens, tools),
            tokenize=False,
            add_generation_prompt=open_turn,
        )
    except TemplateError as error:
        raise DataError(
            f"The chat template refuses these messages ({error}); check their roles and order."
        ) from error
    return str(text)


def guard(tokens: Sequence[str], value: Any) -> Any:
    """Return `value` with each control token in a text within it replaced by its stand-in
    character.
    """
    if isinstance(value, str):
        for index, token in enumerate(tokens):
            value = value.replace(token, chr(FIRST_STAND_IN + index))
        return value
    if isinstance(value, Mapping):
        return {guard(tokens, name): guard(tokens, part) for name, part in value.items()}
    return [guard(tokens, part) for part in value] if isinstance(value, list | tuple) else value


def control_tokens(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Return the texts of all added tokens, longest first, so that none is found inside another."""
    return sorted(tokenizer.get_added_vocab(), key=lambda token: (-len(token), token))


def encode_rendered(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Return the ids of a rendered text: the template's control tokens count, stand-ins become
    ordinary characters.
    """
    tokens = control_tokens(tokenizer)
    ids: list[int] = []
    start = 0
    for found in STAND_INS.finditer(text):
        index = ord(found[0]) - FIRST_STAND_IN
        if index < len(tokens):
            ids += tokenizer(text[start : found.start()], add_special_tokens=False).input_ids
            ids += encode_plain(tokenizer, [tokens[index]])[0]
            start = found.end()
    return ids + list(tokenizer(text[start:], add_special_tokens=False).input_ids)


def encode_prompt(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message]) -> list[int]:
    """Return the ids after which the model writes the assistant's answer."""
    return encode_rendered(tokenizer, render(tokenizer, messages, open_turn=True))


def user_ids(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message]) -> tuple[int, ...]:
    """Return the ids of what tells what a conversation is about: the words of its user, and what
    tools returned.

    Neither the template, nor what the system says to every user, nor what a model wrote is
    evidence.
    """
    texts = [str(message["content"]) for message in messages if message["role"] in USER_ROLES]
    return tuple(encode_plain(tokenizer, ["\n".join(texts)])[0])


def encode_chat(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message]) -> EncodedChat:
    """Return the ids of a finished conversation with the assistant's turns, end-of-turn token
    included, as targets.

    A turn is what the template adds after the open turn. Templates that rewrite earlier turns
    (reasoning models drop old thoughts) leave no such boundary there; those turns are then context
    only.
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
    """Cut `whole` into (text, written by the assistant) parts that join to it."""
    parts: list[tuple[str, bool]] = []
    done = 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index == 0:
            continue
        before = render(tokenizer, messages[:index], open_turn=True)
        after = render(tokenizer, messages[: index + 1])
        if not (whole.startswith(before) and whole.startswith(after) and len(before) >= done):
            continue
        answer = after[len(before) :]
        end = len(before) + len(
            answer.rstrip("\n")
        )  # the template's line break after a turn is not the answer
        parts += [(whole[done : len(before)], False), (whole[len(before) : end], True)]
        done = end
    return [part for part in [*parts, (whole[done:], False)] if part[0]]
