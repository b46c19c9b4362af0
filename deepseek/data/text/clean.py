"""Clean documents: redact secrets, drop duplicates, and report the changes."""

import re
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from datasketch import MinHash, MinHashLSH
from numpy.typing import NDArray

from deepseek.data.text.document import Document, Progress, silent
from deepseek.data.text.filters import Skipped
from deepseek.data.text.secrets import redact_document
from deepseek.errors import DataError

THRESHOLD = 0.8
"""Jaccard similarity of shingle sets above which two documents are near duplicates."""

SHINGLE = 5
"""Words per shingle."""

PERMUTATIONS = 64
"""Hashes per MinHash sketch. Candidates are verified exactly, so a small sketch only misses some
pairs near the threshold.
"""

MAX_SHINGLES = 2_000
"""Most shingles per sketch, those with the smallest hashes (bottom-k, an unbiased sample), so that
long texts stay cheap.
"""

WORD = re.compile(r"\w+")
CODE_WORD = re.compile(r"\w+|[^\w\s]")
"""A word or a sign of code, where an operator is all that tells `a + b` from `a - b`."""

CODE_SHINGLE = 10
"""Words and signs per shingle of code: about five words, as code has about one sign per word."""


def near_duplicates(documents: Sequence[Document], progress: Progress = silent) -> set[int]:
    """Return the indices of documents that are near duplicates of an earlier, retained one.

    Candidates come from MinHash LSH (Broder 1997) and are verified by exact Jaccard similarity.
    """
    index = MinHashLSH(threshold=THRESHOLD, num_perm=PERMUTATIONS, weights=(0.2, 0.8))
    prototype = MinHash(num_perm=PERMUTATIONS, hashfunc=int)
    retained: dict[int, NDArray[np.uint32]] = {}
    dropped: set[int] = set()
    for number, document in enumerate(documents):
        shingles = document_shingles(document)
        sketch = prototype.copy()
        sketch.update_batch(shingles[:MAX_SHINGLES].tolist())
        if any(jaccard(shingles, retained[other]) >= THRESHOLD for other in index.query(sketch)):
            dropped.add(number)
        else:
            index.insert(number, sketch)
            retained[number] = shingles
        if number % 100 == 99:
            progress(number + 1, len(documents), "compare")
    return dropped


def document_shingles(document: Document) -> NDArray[np.uint32]:
    """Return the shingles by which near duplicates of a document are found.

    Those of a conversation come from its turns, since many conversations share a system prompt.
    """
    if document.kind in ("code", "commit"):
        return shingle_hashes(document.text, CODE_WORD, CODE_SHINGLE)
    if document.kind != "messages":
        return shingle_hashes(document.text)
    turns = [
        message["content"]
        for message in document.messages()
        if message["role"] in ("user", "assistant")
    ]
    return shingle_hashes("\n".join(turns) or document.text)


def shingle_hashes(
    text: str, word: re.Pattern[str] = WORD, length: int = SHINGLE
) -> NDArray[np.uint32]:
    """Return the sorted distinct 32-bit hashes of all runs of words.

    Args:
        text: the text.
        word: pattern of a word; default: letters and digits.
        length: words per run; default: `SHINGLE`.
    """
    words = np.array(
        [zlib.crc32(found.encode("utf-8", "replace")) for found in word.findall(text)],
        dtype=np.uint32,
    )
    if len(words) < length:
        return np.array([zlib.crc32(text.encode("utf-8", "replace"))], dtype=np.uint32)
    count = len(words) - length + 1
    hashes = np.zeros(count, dtype=np.uint32)
    for place in range(length):  # polynomial rolling hash; the products wrap on purpose
        hashes = hashes * np.uint32(0x9E3779B1) + words[place : place + count]
        hashes ^= hashes >> np.uint32(15)
    return np.unique(hashes)


def jaccard(left: NDArray[np.uint32], right: NDArray[np.uint32]) -> float:
    """Return the Jaccard similarity of two sets of hashes, each sorted and distinct."""
    shared = len(np.intersect1d(left, right, assume_unique=True))
    return shared / (len(left) + len(right) - shared)


@dataclass
class CleanReport:
    """The report of a cleaning run.

    Attributes:
        read: number of documents read.
        kept: number of documents retained.
        characters: total length of the retained documents.
        changes: number of dropped, redacted or skipped items, by reason.
    """

    read: int = 0
    kept: int = 0
    characters: int = 0
    changes: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        """Return one line for a terminal."""
        parts = [f"{self.kept} documents ({self.characters / 1e6:.1f} MB) of {self.read} read"]
        return ", ".join(
            [*parts, *(f"{count} {what}" for what, count in self.changes.most_common())]
        )


def clean(
    documents: Iterable[Document], skipped: Skipped | None = None, progress: Progress = silent
) -> tuple[list[Document], CleanReport]:
    """Return the documents to train on, in order, and a report.

    Secrets are redacted. Of exact and near duplicates, the first document is retained.

    Args:
        documents: the documents, usually a reader's iterator.
        skipped: the counter passed to the reader, which fills it during iteration; default: none.
        progress: called now and then; default: no progress.

    Raises:
        DataError: no documents are left.
    """
    report = CleanReport()
    skipped = skipped if skipped is not None else Counter()
    seen: set[int] = set()
    distinct: list[Document] = []
    for original in documents:
        report.read += 1
        document, secrets = redact_document(original)
        report.changes.update({f"{kind} redacted": count for kind, count in secrets.items()})
        if report.read % 100 == 0:
            progress(report.read, 0, "clean")
        if not document.text.strip():
            skipped["empty"] += 1
            continue
        key = hash((document.text.strip(), document.kind == "messages"))
        if key in seen:
            report.changes["exact duplicates"] += 1
            continue
        seen.add(key)
        distinct.append(document)
    drop = near_duplicates(distinct, progress)
    result = [document for index, document in enumerate(distinct) if index not in drop]
    report.changes.update({"near duplicates": len(drop)} if drop else {})
    report.changes.update({f"skipped as {reason}": count for reason, count in skipped.items()})
    report.kept = len(result)
    report.characters = sum(len(document.text) for document in result)
    if not result:
        raise DataError(
            f"Nothing is left of {report.read} documents after cleaning; check the source."
        )
    return result, report
