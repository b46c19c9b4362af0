"""Read and write preferences as JSONL and Parquet files with the usual fields: prompt, chosen,
rejected.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from deepseek.checkpoint.files import writable_file
from deepseek.checkpoint.store import atomic_write
from deepseek.data.preferences.database import PreferenceDatabase, Split
from deepseek.data.preferences.preference import Preference
from deepseek.data.text.source import field_names, preferred, records
from deepseek.errors import ConfigError, DataError
from deepseek.terminal import is_unicode, unicode_only
from deepseek.text.messages import check_messages

Message = dict[str, str]

FIELDS = ("prompt", "chosen", "rejected", "source", "labels", "scores")
"""Fields of a record that becomes a pair."""


def read_preferences(path: str | Path, source: str | None = None) -> Iterator[Preference]:
    """Yield the pairs of a `.jsonl` or `.parquet` file.

    A record holds `prompt`, `chosen` and `rejected`, each a text or a list of messages (TRL's two
    formats; answers may repeat the prompt), or two whole conversations without `prompt`, as lists
    of messages or as transcripts ("\n\nHuman: ...\n\nAssistant: ...", the format of hh-rlhf).
    `source`, `labels` and `scores` are optional.

    Args:
        path: the file.
        source: source of pairs without one; default: the file's name.

    Raises:
        DataError: a record has other fields; the message names file and line.
    """
    file = Path(path)
    name = unicode_only(file.name)
    for number, record in records(file, FIELDS):
        yield preference(record, f"{name} line {number}", source or name)


def preference(record: Mapping[str, Any], where: str, source: str) -> Preference:
    """Return the pair of one record.

    Args:
        record: fields of the record, see `read_preferences`.
        where: file and line, named in errors.
        source: source of the pair if the record has none.

    Raises:
        DataError: the record is not a pair.
    """
    if "chosen" not in record or "rejected" not in record:
        fields = field_names(record)
        raise DataError(f"{where} has no `chosen` and `rejected` but {fields}; rename its fields.")
    if "prompt" not in record:
        chosen = spoken(record["chosen"])
        rejected = spoken(record["rejected"])
        prompt = shared_prompt(chosen, rejected, where)
        record = {**record, "chosen": chosen, "rejected": rejected, "prompt": prompt}
    prompt, chosen = conversation_parts(record["prompt"], record["chosen"], where)
    other_prompt, rejected = conversation_parts(record["prompt"], record["rejected"], where)
    if prompt != other_prompt:
        raise DataError(
            f"{where} has answers to different conversations, as they differ before the last "
            "message; cut both after the first answer that differs."
        )
    if chosen == rejected:
        raise DataError(f"{where} prefers an answer to itself; remove it.")
    stored = record.get("scores") or {}
    try:
        stored = json.loads(stored) if isinstance(stored, str) else stored
    except (ValueError, RecursionError):
        raise DataError(f"{where}: the text in `scores` is not JSON; {SCORES}.") from None
    own = record.get("source")
    labels = record.get("labels")
    try:
        pair = Preference(
            tuple(prompt),
            chosen,
            rejected,
            source if own is None or own == "" else own,
            () if labels is None else labels,
            stored,
        )
    except ConfigError as error:
        hint = f"; {SCORES}" if str(error).startswith("scores") else ""
        raise DataError(f"{where}: {str(error).rstrip('.')}{hint}.") from None
    if not all(is_unicode(text) for text in (pair.source, *pair.labels, *pair.scores)):
        raise DataError(
            f"{where} is no Unicode text (it holds half of a surrogate pair); write it as UTF-8."
        )
    return pair


SCORES = "`scores` must map a judge to [score of chosen, score of rejected], two finite numbers"


def conversation_parts(prompt: object, answer: object, where: str) -> tuple[list[Message], str]:
    """Return the messages before an answer, and the answer's text.

    Raises:
        DataError: prompt and answer do not form a conversation; the message names `where`.
    """
    messages = preferred(prompt, answer, where)
    check_messages(messages, where)
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise DataError(
            f"{where}: an answer must be one text or end with an assistant's message after the "
            "prompt."
        )
    turns = [{"role": message["role"], "content": message["content"]} for message in messages]
    return turns[:-1], turns[-1]["content"]


SPEAKERS = {"Human": "user", "Assistant": "assistant"}
TURN = re.compile(r"\n\n(Human|Assistant):[ \n]?")


def spoken(conversation: Any) -> Any:
    """Return the messages of a transcript, and anything else as it is.

    Turns of one speaker that follow each other become one message, and empty turns are left out
    but for the last, which is the answer.

    Args:
        conversation: a text such as "\n\nHuman: Hi!\n\nAssistant: Hello.", or messages.
    """
    if not isinstance(conversation, str) or not TURN.match(conversation):
        return conversation
    parts = TURN.split(conversation)[1:]
    turns = [(SPEAKERS[name], text) for name, text in zip(parts[::2], parts[1::2], strict=True)]
    messages: list[Message] = []
    for place, (role, text) in enumerate(turns, 1):
        if not text.strip() and place < len(turns):
            continue
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += f"\n\n{text.strip()}"
        else:
            messages.append({"role": role, "content": text.strip()})
    return messages


def shared_prompt(chosen: object, rejected: object, where: str) -> list[Any]:
    """Return the messages shared by the start of both conversations, for records without
    `prompt`.
    """
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        raise DataError(
            f"{where} has no `prompt`; add one, or give whole conversations as lists of messages."
        )
    same = 0
    try:
        while same < min(len(chosen), len(rejected)) - 1 and chosen[same] == rejected[same]:
            same += 1
    except RecursionError:
        raise DataError(f"{where} is nested too deeply; write messages as texts.") from None
    return chosen[:same]


def record_of(pair: Preference) -> dict[str, Any]:
    """Return a pair in TRL's conversational format, with source, labels and scores."""
    record: dict[str, Any] = {
        "prompt": [dict(message) for message in pair.prompt],
        "chosen": [{"role": "assistant", "content": pair.chosen}],
        "rejected": [{"role": "assistant", "content": pair.rejected}],
        "source": pair.source,
        "labels": list(pair.labels),
    }
    return record | {"scores": {judge: list(both) for judge, both in pair.scores.items()}}


def write_preferences(
    database: PreferenceDatabase, path: str | Path, split: Split | None = None
) -> int:
    """Write a split of the database to a `.jsonl` or `.parquet` file; return the number of pairs.

    The file is written atomically.

    Args:
        database: the open database.
        path: file to write; its suffix selects the format.
        split: "train" or "eval"; default: all pairs.

    Raises:
        ConfigError: the file cannot be written.
    """
    writable_file(path)
    count = 0
    with atomic_write(path) as part:
        if Path(path).suffix == ".parquet":
            return write_parquet(database, part, split)
        with open(part, "w", encoding="utf-8") as file:
            for count, pair in enumerate(database.pairs(split), 1):  # noqa: B007
                file.write(json.dumps(record_of(pair), ensure_ascii=False) + "\n")
    return count


def write_parquet(database: PreferenceDatabase, part: Path, split: Split | None) -> int:
    """Write the pairs as Parquet; scores become JSON text, since judges differ between pairs."""
    import pyarrow
    from pyarrow import parquet

    records = [record_of(pair) for pair in database.pairs(split)]
    message = pyarrow.list_(pyarrow.struct({"role": pyarrow.string(), "content": pyarrow.string()}))
    texts = {
        "source": pyarrow.string(),
        "labels": pyarrow.list_(pyarrow.string()),
        "scores": pyarrow.string(),
    }
    schema = pyarrow.schema(dict.fromkeys(("prompt", "chosen", "rejected"), message) | texts)
    rows = [record | {"scores": json.dumps(record["scores"])} for record in records]
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), part)
    return len(rows)
