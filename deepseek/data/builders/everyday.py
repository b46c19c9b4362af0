"""Everyday user messages in fifteen languages: seeds of the conversations that gates are calibrated
against.

Gates calibrated on public text alone fire in ordinary chats. The messages are packaged, so that
background conversations can be made on any machine, offline: the base model answers them itself.
They were written for this project and have its licence.
"""

import json
from dataclasses import dataclass
from importlib.resources import files


@dataclass(frozen=True)
class Conversation:
    """What a user says in one conversation; the answers are left to a model.

    Attributes:
        language: ISO 639-1 code, such as `en`.
        topic: what it is about, in English, such as `cooking`.
        turns: the user's messages in order, one or two.
    """

    language: str
    topic: str
    turns: tuple[str, ...]


def everyday_conversations() -> tuple[Conversation, ...]:
    """Return all packaged conversations, in the order of the file: language by language, English
    first.
    """
    with files("deepseek.data.builders").joinpath("everyday.jsonl").open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    return tuple(
        Conversation(record["lang"], record["topic"], tuple(record["turns"])) for record in records
    )
