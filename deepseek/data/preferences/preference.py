"""One pair of a chosen and a rejected answer, with the checks of its fields."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from math import isfinite
from typing import Any

from deepseek import checks
from deepseek.data.text.document import uniform
from deepseek.errors import ConfigError, shown


@dataclass(frozen=True)
class Preference:
    """One pair of answers.

    Attributes:
        prompt: the conversation before the answers, as `{"role", "content"}` messages.
        chosen: the preferred answer.
        rejected: the other answer.
        source: source of the pair, such as a file or a judge's name; default: "".
        labels: topics or flags; default: none.
        scores: judge -> (score of `chosen`, score of `rejected`); default: none.
        id: id in the database; 0 (default) before it is stored.

    Raises:
        ConfigError: a field has a wrong type, a text has lone surrogates, or a score is not finite.
    """

    prompt: tuple[Mapping[str, str], ...]
    chosen: str
    rejected: str
    source: str = ""
    labels: tuple[str, ...] = ()
    scores: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    id: int = 0

    def __post_init__(self) -> None:
        checks.apply(FIELDS, self)

    @property
    def digest(self) -> str:
        """SHA-256 of prompt and answers; equal digests mean duplicates."""
        return sha256(
            json.dumps([self._prompt_text, self.chosen, self.rejected]).encode()
        ).hexdigest()

    @property
    def _prompt_text(self) -> str:
        return json.dumps(
            [dict(message) for message in self.prompt], ensure_ascii=False, sort_keys=True
        )

    def row(self) -> tuple[Any, ...]:
        """Return the columns of table `pairs` without the id.

        `lot` depends only on the prompt, so that all pairs of a prompt are in the same split.
        """
        text = self._prompt_text
        spoken = "\n".join(message["content"] for message in self.prompt)
        labels = json.dumps(self.labels)
        scores = json.dumps({name: list(both) for name, both in self.scores.items()})
        return (
            self.digest,
            text,
            self.chosen,
            self.rejected,
            self.source,
            labels,
            scores,
            uniform(text),
            spoken,
        )

    @staticmethod
    def of(row: Sequence[Any]) -> "Preference":
        """Return the pair in a row of the view `shown`."""
        scores = {name: (both[0], both[1]) for name, both in json.loads(row[6]).items()}
        # Versions before 0.2 stored scores that are not finite.
        scores = {name: both for name, both in scores.items() if all(map(isfinite, both))}
        return Preference(
            tuple(json.loads(row[1])),
            row[2],
            row[3],
            row[4],
            tuple(json.loads(row[5])),
            scores,
            row[0],
        )


def _messages(name: str, value: Any) -> tuple[dict[str, str], ...]:
    """Return the checked messages of a prompt: mappings of texts with a role and a content."""
    messages = [checks.mapping(name, part) for part in checks.sequence(name, value, _anything)]
    for place, message in enumerate(messages):
        for key in ("role", "content"):
            checks.text(f"{name}[{place}][{key!r}]", message.get(key))
        for key, part in message.items():
            checks.text(f"{name}[{place}] key", key)
            checks.text(f"{name}[{place}][{key!r}]", part)
    return tuple(messages)


def _scores(name: str, value: Any) -> dict[str, tuple[float, float]]:
    """Return checked scores: judge -> (score of `chosen`, score of `rejected`)."""
    table = {}
    for judge, both in checks.mapping(name, value).items():
        where = f"{name}[{shown(judge)}]"
        pair = checks.sequence(where, both, checks.number, "two numbers")
        if len(pair) != 2:
            raise ConfigError(f"{where}={shown(both)} must be two numbers.")
        table[checks.text(where, judge)] = (pair[0], pair[1])
    return table


def _anything(_: str, value: Any) -> Any:
    return value


MAX_ID = 2**63 - 1
"""Largest id of a row in SQLite."""

FIELDS: dict[str, checks.Check] = {
    "prompt": _messages,
    "chosen": checks.text,
    "rejected": checks.text,
    "source": checks.text,
    "labels": lambda name, value: tuple(checks.texts(name, value)),
    "scores": _scores,
    "id": partial(checks.whole, least=0, most=MAX_ID),
}
"""Type and range of each field of `Preference`."""
