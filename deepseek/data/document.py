"""A document: one text with the name it is known by, and its conversation form."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal

from deepseek.errors import DataError
from deepseek.text.chat import check_messages

Kind = Literal["text", "code", "commit", "messages"]

Progress = Callable[[int, int, str], None]
"""`progress(done, total, what)`: called from time to time during a long job; total 0 means unknown."""


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


def conversation(messages: Sequence[Mapping[str, str]], where: str, name: str, time: int = 0) -> Document:
    """Return a document of kind `messages`; raise `DataError` saying `where` if a message lacks role or content."""
    check_messages(messages, where)
    kept = [{"role": message["role"], "content": message["content"]} for message in messages]
    return Document(json.dumps(kept, ensure_ascii=False), name, "messages", time)


def not_empty(documents: Iterable[Document], complaint: Callable[[], str]) -> Iterator[Document]:
    """Yield the documents; raise `DataError` with the complaint, made only then, if there were none."""
    found = False
    for document in documents:
        found = True
        yield document
    if not found:
        raise DataError(complaint())


def uniform(key: str) -> float:
    """Return a number in [0, 1) drawn by the key alone."""
    return int.from_bytes(sha256(key.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64
