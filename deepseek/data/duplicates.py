"""Near-duplicate documents: MinHash candidates (Broder 1997), each confirmed by its exact Jaccard similarity."""

import re
import zlib
from collections.abc import Sequence

import numpy as np
from datasketch import MinHash, MinHashLSH
from numpy.typing import NDArray

from deepseek.data.document import Progress, silent

THRESHOLD = 0.8
"""Jaccard similarity of the shingle sets from which two documents count as the same."""

SHINGLE = 5
"""Words in a shingle."""

PERMUTATIONS = 64
"""Hashes in a sketch; candidates are confirmed exactly, so a small sketch only misses some pairs near the threshold."""

MAX_SHINGLES = 2_000
"""Shingles sketched per document: those with the smallest hashes (bottom-k), a fair sample; long texts stay cheap."""

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
    words = np.array([zlib.crc32(word.encode("utf-8", "replace")) for word in WORD.findall(text)], dtype=np.uint32)
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
