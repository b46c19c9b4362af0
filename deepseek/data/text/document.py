"""A document: one text with the name it is known by, and its conversation form; and which of
several are held out.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import PurePosixPath
from typing import Literal

from deepseek.errors import DataError
from deepseek.text.chat_template import check_messages

Kind = Literal["text", "code", "commit", "messages"]

Progress = Callable[[int, int, str], None]
"""`progress(done, total, what)`: called from time to time during a long job; total 0 means
unknown.
"""


def silent(_done: int, _total: int, _what: str) -> None:
    """Show nothing."""


@dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        text: the whole text; for kind `messages` a JSON array of `{"role", "content"}` objects.
        name: where it comes from, stable over runs: `repo/path`, `file.jsonl:17`, `repo@commit`.
        kind: `text`, `code`, `commit` or `messages`.
        time: seconds since 1970 at which the text came into being, 0 if unknown.
    """

    text: str
    name: str
    kind: Kind = "text"
    time: int = 0

    def messages(self) -> list[dict[str, str]]:
        """Return the conversation of a document of kind `messages`."""
        loaded: list[dict[str, str]] = json.loads(self.text)
        return loaded


def conversation(
    messages: Sequence[Mapping[str, str]], where: str, name: str, time: int = 0
) -> Document:
    """Return a document of kind `messages`; raise `DataError` saying `where` if a message lacks
    role or content.
    """
    check_messages(messages, where)
    kept = [{"role": message["role"], "content": message["content"]} for message in messages]
    return Document(json.dumps(kept, ensure_ascii=False), name, "messages", time)


def not_empty(documents: Iterable[Document], complaint: Callable[[], str]) -> Iterator[Document]:
    """Yield the documents; raise `DataError` with the complaint, made only then, if there were
    none.
    """
    found = False
    for document in documents:
        found = True
        yield document
    if not found:
        raise DataError(complaint())


def uniform(key: str) -> float:
    """Return a number in [0, 1) drawn by the key alone."""
    return int.from_bytes(sha256(key.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64


Rule = Literal["file", "directory", "time"]


def split(
    documents: Sequence[Document], held_out: float = 0.1, by: Rule = "file", seed: int = 0
) -> tuple[list[Document], list[Document]]:
    """Return (train, held out), about the share `held_out` of the documents in the second, both in
    the given order.

    - `file`: a hash of name and seed decides for each document alone, so adding files moves no
    other.
    - `directory`: the same with the folder's name, so that neighbours stay together.
    - `time`: all documents later than a cut are held out; equal times stay together.

    Raises `DataError` if either side would be empty.
    """
    if not 0 < held_out < 1:
        raise DataError(f"The held-out share must lie between 0 and 1; it is {held_out}.")
    chosen = (
        by_time(documents, held_out) if by == "time" else by_hash(documents, held_out, by, seed)
    )
    train = [document for document, held in zip(documents, chosen, strict=True) if not held]
    test = [document for document, held in zip(documents, chosen, strict=True) if held]
    if not train or not test:
        empty = "train on" if not train else "hold out"
        raise DataError(
            f"Of {len(documents)} documents none is left to {empty}; give more or another held-out share."
        )
    return train, test


def by_hash(documents: Iterable[Document], held_out: float, by: Rule, seed: int) -> list[bool]:
    """Return whether each document is held out, from a hash of its name or folder."""
    keys = (str(PurePosixPath(d.name).parent) if by == "directory" else d.name for d in documents)
    draws = [uniform(f"{seed}:{key}") for key in keys]
    cut = sorted(set(draws))[
        :-1
    ]  # of a few documents one is held out and one kept, whatever they draw
    limit = min(max(held_out, cut[0]), cut[-1]) if cut else 0.0
    return [draw <= limit for draw in draws]


def by_time(documents: Sequence[Document], held_out: float) -> list[bool]:
    """Return whether each document lies after the cut that leaves about `held_out` of them behind
    it.
    """
    times = sorted(document.time for document in documents)
    if not times or times[0] == times[-1]:
        raise DataError("The documents carry no different times; split by file instead.")
    cut = times[max(0, min(len(times) - 1, round(len(times) * (1 - held_out)) - 1))]
    if cut == times[-1]:  # many documents share the last time: cut just before it
        cut = max(time for time in times if time < cut)
    return [document.time > cut for document in documents]
