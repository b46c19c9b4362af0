"""Cleaning: secrets redacted, duplicates dropped, and a count of everything that was done."""

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
"""Jaccard similarity of the shingle sets from which two documents count as the same."""

SHINGLE = 5
"""Words in a shingle."""

PERMUTATIONS = 64
"""Hashes in a sketch; candidates are confirmed exactly, so a small sketch only misses some pairs
near the threshold.
"""

MAX_SHINGLES = 2_000
"""Shingles sketched per document: those with the smallest hashes (bottom-k), a fair sample; long
texts stay cheap.
"""

WORD = re.compile(r"\w+")


def near_duplicates(texts: Sequence[str], progress: Progress = silent) -> set[int]:
    """Return the indices of texts that nearly equal an earlier text that is kept."""
    index = MinHashLSH(threshold=THRESHOLD, num_perm=PERMUTATIONS, weights=(0.2, 0.8))
    prototype = MinHash(num_perm=PERMUTATIONS, hashfunc=int)
    kept: dict[int, NDArray[np.uint32]] = {}
    dropped: set[int] = set()
    for number, text in enumerate(texts):
        shingles = shingle_hashes(text)
        sketch = prototype.copy()
        sketch.update_batch(shingles[:MAX_SHINGLES].tolist())
        if any(jaccard(shingles, kept[other]) >= THRESHOLD for other in index.query(sketch)):
            dropped.add(number)
        else:
            index.insert(number, sketch)
            kept[number] = shingles
        if number % 100 == 99:
            progress(number + 1, len(texts), "compare")
    return dropped


def shingle_hashes(text: str) -> NDArray[np.uint32]:
    """Return the sorted distinct 32-bit hashes of all runs of `SHINGLE` words."""
    words = np.array(
        [zlib.crc32(word.encode("utf-8", "replace")) for word in WORD.findall(text)],
        dtype=np.uint32,
    )
    if len(words) < SHINGLE:
        return np.array([zlib.crc32(text.encode("utf-8", "replace"))], dtype=np.uint32)
    count = len(words) - SHINGLE + 1
    hashes = np.zeros(count, dtype=np.uint32)
    for place in range(SHINGLE):  # a polynomial in an odd base, products wrap on purpose
        hashes = hashes * np.uint32(0x9E3779B1) + words[place : place + count]
        hashes ^= hashes >> np.uint32(15)
    return np.unique(hashes)


def jaccard(left: NDArray[np.uint32], right: NDArray[np.uint32]) -> float:
    """Return the shared part of two sets of hashes, each sorted and distinct."""
    shared = len(np.intersect1d(left, right, assume_unique=True))
    return shared / (len(left) + len(right) - shared)


@dataclass
class CleanReport:
    """What cleaning found.

    Attributes:
        read, kept: documents that came in and out.
        characters: length of those kept.
        changes: how much was dropped, redacted or left unread by the reader, by reason.
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
    """Return the documents worth training on, in order, and a report.

    Of equal or nearly equal documents the first is kept. `skipped` is the counter given to the
    reader, filled while it is read here. Raises `DataError` if nothing is left.
    """
    report = CleanReport()
    skipped = skipped if skipped is not None else Counter()
    seen: set[int] = set()
    kept: list[Document] = []
    for original in documents:
        report.read += 1
        document, found = redact_document(original)
        report.changes.update({f"{kind} redacted": count for kind, count in found.items()})
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
        kept.append(document)
    drop = near_duplicates([document.text for document in kept], progress)
    result = [document for index, document in enumerate(kept) if index not in drop]
    report.changes.update({"near duplicates": len(drop)} if drop else {})
    report.changes.update({f"skipped as {reason}": count for reason, count in skipped.items()})
    report.kept = len(result)
    report.characters = sum(len(document.text) for document in result)
    if not result:
        raise DataError(
            f"Nothing is left of {report.read} documents after cleaning; check the source."
        )
    return result, report
