"""Messages of a conversation, and their check. Imports nothing heavy, for the command line."""

from collections.abc import Mapping, Sequence
from typing import Any

from deepseek.errors import DataError, shown
from deepseek.terminal import is_unicode

Message = Mapping[str, Any]
"""`{"role": "system" | "user" | "assistant", "content": text}`. Templates with tool support read
further fields.
"""


def check_messages(messages: Sequence[Message], where: str = "The conversation") -> None:
    """Raise `DataError` unless there are messages and each has a text role and a text content.

    Args:
        messages: the conversation.
        where: beginning of the error message.
    """
    if not isinstance(messages, list | tuple):
        raise DataError(f"{where} is {shown(messages)}; it must be a list of messages.")
    if not messages:
        raise DataError(f"{where} has no messages; give at least one with a role and a content.")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not all(
            isinstance(message.get(k), str) for k in ("role", "content")
        ):
            raise DataError(
                f"{where}: message {number} needs a text role and a text content; it is "
                f"{shown(message)}."
            )
        if not (is_unicode(message["role"]) and is_unicode(message["content"])):
            raise DataError(
                f"{where}: message {number} is no Unicode text (it holds half of a surrogate "
                "pair); write it as UTF-8."
            )
