"""Everyday user messages in fifteen languages, the seeds of background conversations for gate
calibration.

Gates calibrated on public text alone fire in ordinary chats. The messages are part of the package,
so that background conversations can be generated offline: the base model writes the answers. The
messages were written for this project and have its licence.
"""

import json
from dataclasses import dataclass
from importlib.resources import files


@dataclass(frozen=True)
class Conversation:
    """The user's messages of one conversation; a model writes the answers.

    Attributes:
        language: ISO 639-1 code, such as `en`.
        topic: topic in English, such as `cooking`.
        turns: the user's messages in order, one or two.
    """

    language: str
    topic: str
    turns: tuple[str, ...]


def everyday_conversations() -> tuple[Conversation, ...]:
    """Return all packaged conversations, grouped by language, English first."""
    with files("deepseek.data.builders").joinpath("everyday.jsonl").open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    return tuple(
        Conversation(record["lang"], record["topic"], tuple(record["turns"])) for record in records
    )
