"""Clean documents: redact secrets, drop duplicates, and report the changes."""

import re
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from datasketch import MinHash, MinHashLSH
from numpy.typing import NDArray

from deepseek.data.text.document import Document, Progress, characters, silent
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
"""Maximum shingles per sketch, those with the smallest hashes (bottom-k, an unbiased sample), so
that long texts stay cheap.
"""

MOST_VERIFIED = 50
"""Maximum candidates to compare exactly with a document, those with the most similar sketches.
Texts that share a header, such as a licence, are candidates of each other by the thousand.
"""

WITHOUT_SPACES = (
    r"\u0e00-\u0eff"  # Thai and Lao
    r"\u1000-\u109f\u1780-\u17ff"  # Burmese and Khmer
    r"\u3005-\u3007\u3040-\u30ff\uff66-\uff9f"  # Japanese
    r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese characters
)
"""Scripts that write no spaces between words, as ranges of a character class."""

WORD = re.compile(rf"([{WITHOUT_SPACES}]|[^\W{WITHOUT_SPACES}]+)(\W*)")
"""A word, or one character of a script without spaces, and what follows up to the next one."""


def near_duplicates(documents: Sequence[Document], progress: Progress = silent) -> dict[int, int]:
    """Return a mapping from the index of each near duplicate to that of the earlier document that
    is retained.

    Candidates come from MinHash LSH (Broder 1997) and are verified by exact Jaccard similarity.
    """
    index = MinHashLSH(threshold=THRESHOLD, num_perm=PERMUTATIONS, weights=(0.2, 0.8))
    prototype = MinHash(num_perm=PERMUTATIONS, hashfunc=int)
    sketches = np.empty((len(documents), PERMUTATIONS), dtype=np.uint32)
    sizes = np.empty(len(documents), dtype=np.int64)
    retained_shingles: dict[int, NDArray[np.uint32]] = {}
    dropped: dict[int, int] = {}
    for number, document in enumerate(documents):
        shingles = document_shingles(document)
        sketch = prototype.copy()
        sketch.update_batch(shingles[:MAX_SHINGLES].tolist())
        sketches[number] = sketch.hashvalues
        sizes[number] = len(shingles)
        candidates = np.array(index.query(sketch), dtype=np.int64)
        candidates = candidates[may_be_alike(sizes[number], sizes[candidates])]
        matches = [
            candidate
            for candidate in most_similar(sketches, number, candidates).tolist()
            if jaccard(shingles, retained_shingles[candidate]) >= THRESHOLD
        ]
        if matches:
            dropped[number] = min(matches)
        else:
            index.insert(number, sketch)
            retained_shingles[number] = shingles
        if number % 100 == 99:
            progress(number + 1, len(documents), "compare")
    return dropped


def most_similar(
    sketches: NDArray[np.uint32], number: int, candidates: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the candidates that are worth an exact comparison, at most `MOST_VERIFIED`: those
    whose sketches have the most values in common with that of the document.

    Values that fewer candidates have count more: those from a shared header do not tell which of
    the texts under it are alike.

    Args:
        sketches: sketch of each document, of shape (documents, `PERMUTATIONS`).
        number: index of the document.
        candidates: indices of the documents that may be similar.
    """
    if len(candidates) <= MOST_VERIFIED:
        return candidates
    equal = sketches[candidates] == sketches[number]
    scores = equal @ (1 - equal.mean(axis=0))
    return candidates[np.argpartition(-scores, MOST_VERIFIED)[:MOST_VERIFIED]]


def document_shingles(document: Document) -> NDArray[np.uint32]:
    """Return the shingles by which near duplicates of a document are found.

    Those of a conversation come from its turns, since many conversations share a system prompt.
    """
    if document.kind != "messages":
        return shingle_hashes(document.text)
    turns = [
        message["content"]
        for message in document.messages()
        if message["role"] in ("user", "assistant")
    ]
    return shingle_hashes("\n".join(turns) or document.text)


def shingle_hashes(text: str) -> NDArray[np.uint32]:
    """Return the sorted distinct 32-bit hashes of all runs of `SHINGLE` words, each with the signs
    after it: in code and tables only a sign tells `a + b` from `a - b`. Spaces do not count.
    """
    words = np.array(
        [
            zlib.crc32((word + "".join(after.split())).encode("utf-8", "replace"))
            for word, after in WORD.findall(text)
        ],
        dtype=np.uint32,
    )
    if len(words) < SHINGLE:
        return np.array([zlib.crc32(text.encode("utf-8", "replace"))], dtype=np.uint32)
    count = len(words) - SHINGLE + 1
    hashes = np.zeros(count, dtype=np.uint32)
    for place in range(SHINGLE):  # polynomial rolling hash; the products wrap on purpose
        hashes = hashes * np.uint32(0x9E3779B1) + words[place : place + count]
        hashes ^= hashes >> np.uint32(15)
    return np.unique(hashes)


def jaccard(left: NDArray[np.uint32], right: NDArray[np.uint32]) -> float:
    """Return the Jaccard similarity of two sets of hashes, each sorted and distinct."""
    smaller, larger = sorted((left, right), key=len)
    places = np.searchsorted(larger, smaller).clip(max=len(larger) - 1)
    num_shared = int(np.count_nonzero(larger[places] == smaller))
    return num_shared / (len(left) + len(right) - num_shared)


def may_be_alike(size: np.int64, sizes: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return for each other size whether sets of these sizes can be as similar as near duplicates
    are.
    """
    return np.minimum(size, sizes) >= THRESHOLD * np.maximum(size, sizes)


@dataclass
class CleanReport:
    """The report of a cleaning run.

    Attributes:
        read: number of documents read.
        kept: number of documents retained.
        characters: total length of the retained documents.
        changes: number of dropped, redacted or skipped items, by reason.
        duplicates: name of each exact or near duplicate that was dropped, with the name of the
            document that was retained.
    """

    read: int = 0
    kept: int = 0
    characters: int = 0
    changes: Counter[str] = field(default_factory=Counter)
    duplicates: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return one line for a terminal."""
        parts = [f"{self.kept} documents ({self.characters / 1e6:.1f} MB) of {self.read} read"]
        return ", ".join(
            [*parts, *(f"{count} {change}" for change, count in self.changes.most_common())]
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
    first_indices: dict[int, int] = {}
    copies: dict[str, int] = {}
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
        if key in first_indices:
            report.changes["exact duplicates"] += 1
            copies[document.name] = first_indices[key]
            continue
        first_indices[key] = len(distinct)
        distinct.append(document)
    near_copies = near_duplicates(distinct, progress)
    retained_documents = [
        document for index, document in enumerate(distinct) if index not in near_copies
    ]
    copies.update({distinct[index].name: index for index in near_copies})
    report.duplicates = {
        name: distinct[near_copies.get(index, index)].name for name, index in copies.items()
    }
    report.changes.update({"near duplicates": len(near_copies)} if near_copies else {})
    report.changes.update({f"skipped as {reason}": count for reason, count in skipped.items()})
    report.kept = len(retained_documents)
    report.characters = characters(retained_documents)
    if not retained_documents:
        raise DataError(
            f"Nothing is left of {report.read} documents after cleaning; check the source."
        )
    return retained_documents, report
