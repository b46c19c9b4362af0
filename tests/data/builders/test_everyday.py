"""Everyday messages: enough in every language, well formed, all different, and included in the
wheel.
"""

import json
import zipfile
from collections import Counter
from pathlib import Path

from hatchling.builders.wheel import WheelBuilder
from test_floors import PACKAGE

from deepseek.data.builders.everyday import everyday_conversations

FILE = PACKAGE / "data" / "builders" / "everyday.jsonl"
OTHERS = ("de", "fr", "es", "it", "pt", "nl", "pl", "ru", "zh", "ja", "ko", "ar", "tr", "hi")
COUNTS = {"en": 400} | dict.fromkeys(OTHERS, 60)


def test_every_line_has_valid_fields() -> None:
    for line in FILE.read_text(encoding="utf-8").split("\n")[:-1]:
        record = json.loads(line)
        assert list(record) == ["lang", "topic", "turns"], line
        assert isinstance(record["lang"], str) and isinstance(record["topic"], str), line
        assert isinstance(record["turns"], list) and all(
            isinstance(turn, str) for turn in record["turns"]
        ), line
        assert record["topic"] and record["topic"] == record["topic"].strip().lower(), line


def test_counts_per_language() -> None:
    assert Counter(conversation.language for conversation in everyday_conversations()) == COUNTS


def test_no_turn_is_empty_or_padded_and_none_is_long() -> None:
    for conversation in everyday_conversations():
        assert 1 <= len(conversation.turns) <= 2, conversation
        for turn in conversation.turns:
            assert turn and turn == turn.strip() and len(turn.split()) <= 120, conversation


def test_no_conversation_begins_like_another() -> None:
    first = Counter(conversation.turns[0].casefold() for conversation in everyday_conversations())
    assert [turn for turn, count in first.items() if count > 1] == []


def test_every_language_has_follow_ups_and_few_computer_topics() -> None:
    for language, count in COUNTS.items():
        chosen = [
            conversation
            for conversation in everyday_conversations()
            if conversation.language == language
        ]
        topics = Counter(conversation.topic for conversation in chosen)
        assert 0.2 < sum(len(conversation.turns) == 2 for conversation in chosen) / count < 0.3, (
            language
        )
        assert 0.1 < (topics["computer"] + topics["programming"]) / count < 0.2, language
        assert len(topics) >= 30, language


def test_the_wheel_holds_the_file(tmp_path: Path) -> None:
    (path,) = WheelBuilder(str(PACKAGE.parent)).build(
        directory=str(tmp_path), versions=["standard"]
    )
    with zipfile.ZipFile(path) as wheel:
        assert wheel.read("deepseek/data/builders/everyday.jsonl") == FILE.read_bytes()
