"""Documents, the unit of training text, and their split into training and held-out sets."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import accumulate
from pathlib import PurePosixPath
from typing import Literal

from deepseek.errors import DataError
from deepseek.terminal import unicode_only
from deepseek.text.messages import check_messages

Kind = Literal["text", "code", "commit", "messages", "infill"]

Progress = Callable[[int, int, str], None]
"""`progress(done, total, what)`, called now and then during a long job; total 0 means unknown."""

LINE_BREAKS = re.compile(r"[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")
"""Characters at which `str.splitlines` breaks a line."""


def silent(_done: int, _total: int, _what: str) -> None:
    """Report no progress."""


@dataclass(frozen=True)
class Document:
    """One text with its name and kind.

    Attributes:
        text: the whole text; for kind `messages`, a JSON array of `{"role", "content"}` objects;
            for kind `infill`, a JSON object with `prefix`, `suffix` and `middle`.
        name: its source, stable across runs: `repo/path`, `file.jsonl:17`, `repo@commit`.
        kind: `text`, `code`, `commit`, `messages` or `infill`; default: `text`.
        time: creation time in seconds since 1970; 0 (default): unknown.
    """

    text: str
    name: str
    kind: Kind = "text"
    time: int = 0

    def messages(self) -> list[dict[str, str]]:
        """Return the conversation of a document of kind `messages`."""
        messages: list[dict[str, str]] = json.loads(self.text)
        return messages

    @property
    def digest(self) -> str:
        """SHA-256 of kind, name and text, in hexadecimal: the same document has the same one."""
        parts = json.dumps([self.kind, self.name, self.text])
        return sha256(parts.encode()).hexdigest()

    @property
    def text_digest(self) -> str:
        """SHA-256 of the text alone, in hexadecimal: a renamed document keeps it."""
        return sha256(self.text.strip().encode("utf-8", "surrogatepass")).hexdigest()

    def gap(self) -> tuple[str, str, str]:
        """Return prefix, suffix and middle of a document of kind `infill`."""
        parts: dict[str, str] = json.loads(self.text)
        return parts["prefix"], parts["suffix"], parts["middle"]


def conversation(
    messages: Sequence[Mapping[str, str]], where: str, name: str, time: int = 0
) -> Document:
    """Return a conversation as a document of kind `messages`.

    Args:
        messages: messages with at least `role` and `content`; other fields are dropped.
        where: source of the messages, named in errors.
        name: name of the document.
        time: creation time in seconds since 1970; default: 0 (unknown).

    Raises:
        DataError: a message lacks role or content.
    """
    check_messages(messages, where)
    turns = [{"role": message["role"], "content": message["content"]} for message in messages]
    return Document(json.dumps(turns, ensure_ascii=False), name, "messages", time)


def document_name(name: str) -> str:
    """Return the name of a document for the name of a file.

    Line breaks become U+FFFD, as do bytes that are not text: names stand on lines of their own,
    before the text of a file and in the changes of a commit.
    """
    return LINE_BREAKS.sub("\ufffd", unicode_only(name))


def split_lines(text: str) -> list[str]:
    """Return the lines of a text with their line ends, as editors and git count them.

    They end at line feeds alone; `str.splitlines` also ends them at form feeds and others.
    """
    return re.findall(r"[^\n]*\n|[^\n]+", text)


def characters(documents: Iterable[Document]) -> int:
    """Return the length of all documents together."""
    return sum(len(document.text) for document in documents)


def not_empty(documents: Iterable[Document], complaint: Callable[[], str]) -> Iterator[Document]:
    """Yield the documents; raise `DataError` with the message from `complaint` if there were
    none.
    """
    is_empty = True
    for document in documents:
        is_empty = False
        yield document
    if is_empty:
        raise DataError(complaint())


def uniform(key: str) -> float:
    """Return a number in [0, 1) that depends only on the key (by SHA-256)."""
    return int.from_bytes(sha256(key.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64


Rule = Literal["file", "directory", "time"]

LEAST_HELD_OUT = 0.5
"""Share of the text that was to be held out, of which less is too little to report on."""


def split(
    documents: Sequence[Document], held_out: float = 0.1, by: Rule = "file", seed: int = 0
) -> tuple[list[Document], list[Document]]:
    """Return (training documents, held-out documents), both in their original order.

    Commits draw a lot as other documents do, but show text of files: see `follow_files`.

    Args:
        documents: the documents.
        held_out: share of the documents to hold out, in (0, 1); default: 0.1. The result is
            approximate.
        by: rule of the split; default: `file`.

            - `file`: a hash of name and seed decides for each document by itself, so that new
              files do not move others.
            - `directory`: the same by the folder's name, so that neighbours stay together.
            - `time`: all documents later than a cut are held out; equal times stay together.
        seed: seed of the hash; unused by `time`.

    Raises:
        DataError: either side would be empty.
    """
    if not 0 < held_out < 1:
        raise DataError(f"The held-out share must lie between 0 and 1; it is {held_out}.")
    if by == "time":
        is_held_out = by_time(documents, held_out)
    else:
        lots = draw_lots(documents, held_out, by, seed)
        is_held_out = [lots.is_held_out(document.name) for document in documents]
    train = [
        document for document, is_test in zip(documents, is_held_out, strict=True) if not is_test
    ]
    test = [document for document, is_test in zip(documents, is_held_out, strict=True) if is_test]
    if not train or not test:
        if len(documents) < 2:
            raise DataError(
                f"{len(documents)} document cannot be divided into text to train on and text to "
                "hold out; give two or more, such as the parts of a long one."
            )
        purpose = "train on" if not train else "hold out"
        raise DataError(
            f"Of {len(documents)} documents none is left to {purpose}; "
            "give more or another held-out share."
        )
    return train, test


@dataclass(frozen=True)
class KnownNames:
    """Names of documents whose side of the split is known, so that they draw no lot.

    Attributes:
        learnt: names of training documents; they count before `tested`. Default: none.
        tested: names of held-out documents; default: none.
    """

    learnt: frozenset[str] = frozenset()
    tested: frozenset[str] = frozenset()

    def is_held_out(self, name: str) -> bool | None:
        """Return whether a document of this name is held out, None if that is not known."""
        if name in self.learnt:
            return False
        return True if name in self.tested else None


@dataclass(frozen=True)
class Lots:
    """The lot of each name, a hash of the name or of its folder; the lowest are held out.

    Attributes:
        by: rule of the split, `file` or `directory`.
        seed: seed of the hash.
        limit: highest lot that is held out; default: 0.
        known: names that draw no lot; default: none.
    """

    by: Rule
    seed: int
    limit: float = 0.0
    known: KnownNames = KnownNames()

    def draw(self, name: str) -> float:
        """Return the lot of a name, in [0, 1)."""
        key = str(PurePosixPath(name).parent) if self.by == "directory" else name
        return uniform(f"{self.seed}:{key}")

    def is_held_out(self, name: str) -> bool:
        """Return whether a document of this name is held out."""
        known_side = self.known.is_held_out(name)
        return self.draw(name) <= self.limit if known_side is None else known_side


def draw_lots(documents: Sequence[Document], held_out: float, by: Rule, seed: int) -> Lots:
    """Return the lots of documents, of which about the share `held_out` is held out.

    Of only two files, one is held out and one is not. Commits don't count here, since they follow
    their files (`follow_files`), unless there are no two files.

    Args:
        documents: the documents.
        held_out: share of the documents to hold out, in (0, 1).
        by: rule of the split, `file` or `directory`.
        seed: seed of the hash.
    """
    lots = Lots(by, seed)
    files = [document for document in documents if document.kind != "commit"]
    for candidates in (files, documents):
        sizes: Counter[float] = Counter()
        for document in candidates:
            sizes[lots.draw(document.name)] += len(document.text)
        if len(sizes) > 1:
            return replace(lots, limit=highest_lot(sizes, held_out))
    return lots


def highest_lot(sizes: Mapping[float, int], held_out: float) -> float:
    """Return the highest lot that is held out: `held_out` itself, as lots are uniform, unless the
    few documents of a small source, or their sizes, leave far too little text below it.

    At least one lot is at or below it, and one above.

    Args:
        sizes: characters of each lot; at least two lots.
        held_out: share of the text to hold out, in (0, 1).
    """
    lots = sorted(sizes)[:-1]
    usual = min(max(held_out, lots[0]), lots[-1])
    text_up_to = dict(zip(lots, accumulate(sizes[lot] for lot in lots), strict=True))
    wanted = held_out * sum(sizes.values())
    if max(text for lot, text in text_up_to.items() if lot <= usual) >= LEAST_HELD_OUT * wanted:
        return usual
    return min(lots, key=lambda lot: abs(text_up_to[lot] - wanted))


def by_time(documents: Sequence[Document], held_out: float) -> list[bool]:
    """Return for each document whether it is after the cut, as about a share `held_out` is."""
    times = sorted(document.time for document in documents)
    if not times or times[0] == times[-1]:
        raise DataError("The documents carry no different times; split by file instead.")
    cut = times[max(0, min(len(times) - 1, round(len(times) * (1 - held_out)) - 1))]
    if cut == times[-1]:  # many documents share the last time, so cut just before it
        cut = max(time for time in times if time < cut)
    return [document.time > cut for document in documents]
