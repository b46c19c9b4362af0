"""A BM25 index over passages, in memory and as a folder without code or pickles in it.

BM25 (Robertson and Zaragoza 2009, doi:10.1561/1500000019) by the library bm25s (arXiv:2407.03618).
"""

import json
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np

from deepseek.checkpoint.store import atomic_folder, read_json, write_json
from deepseek.data.text.document import Document
from deepseek.errors import CheckpointError, DataError
from deepseek.retrieval.passages import Passage, passages
from deepseek.retrieval.words import search_words

FORMAT = 1
DEFAULT_PASSAGES = 4
CANDIDATES = 8
"""Ranked passages that are looked at for each one wanted: neighbours overlap, and some do not
fit.
"""

Length = Callable[[str], int]
"""The size of a text, in tokens."""


class Index:
    """Passages and the statistics that rank them.

    Attributes:
        passages: all of them.
        source: what they were made from: the digest of the token shards, or "".
    """

    def __init__(self, passages: list[Passage], ranking: Any, source: str = "") -> None:
        """Take passages and the bm25s index over them, in the same order."""
        self.passages = passages
        self.source = source
        self._ranking = ranking

    def __len__(self) -> int:
        return len(self.passages)

    @classmethod
    def build(
        cls, documents: Iterable[Document], without: Collection[str] = (), source: str = ""
    ) -> Self:
        """Return an index of `documents`.

        Args:
            without: names of documents that must not be found, in commits that changed them
                neither.
            source: kept with the index.

        Raises `DataError` if no text is left.
        """
        import bm25s

        left_out = frozenset(without)
        kept: list[Passage] = []
        words: list[list[str]] = []
        for document in documents:
            for passage, matched in _allowed(document, left_out):
                kept.append(passage)
                words.append(search_words(matched))
        if not any(words):
            raise DataError("There is no text to index; give documents with words in them.")
        vocabulary = {
            word: place
            for place, word in enumerate(sorted({word for each in words for word in each}))
        }
        ids = [[vocabulary[word] for word in each] for each in words]
        ranking = bm25s.BM25(backend="numpy")
        ranking.index((ids, vocabulary), show_progress=False)
        return cls(kept, ranking, source)

    def rank(self, query: str, count: int) -> list[Passage]:
        """Return the `count` passages that match best, best first; those that share no word are
        left out.
        """
        known = self._ranking.get_tokens_ids(search_words(query))
        if not known:
            return []
        scores = self._ranking.get_scores_from_ids(known)
        order = np.argsort(-scores, kind="stable")[:count]
        return [self.passages[place] for place in order.tolist() if scores[place] > 0]

    def retrieve(
        self,
        query: str,
        k: int = DEFAULT_PASSAGES,
        max_tokens: int | None = None,
        length: Length = len,
    ) -> list[Passage]:
        """Return at most `k` passages for a query, best first, none of which overlap.

        Args:
            max_tokens: most that all of them together may have, by `length`; what does not fit is
                passed over.
            length: counts the tokens of a text; without it, characters are counted.
        """
        chosen: list[Passage] = []
        left = max_tokens
        for passage in self.rank(query, k * CANDIDATES):
            if len(chosen) == k:
                break
            if any(passage.overlaps(other) or passage.text == other.text for other in chosen):
                continue
            if left is not None:
                size = length(passage.text)
                if size > left:
                    continue
                left -= size
            chosen.append(passage)
        return chosen

    def save(self, folder: str | Path) -> None:
        """Write the index as a folder: passages as JSON lines, the statistics as NumPy arrays;
        whole or not at all.
        """
        with atomic_folder(folder) as temporary:
            self._ranking.save(str(temporary), show_progress=False)
            lines = (json.dumps(passage.as_json(), ensure_ascii=False) for passage in self.passages)
            (temporary / "passages.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
            write_json(temporary / "meta.json", {"format": FORMAT, "source": self.source})

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Open what `save` wrote; raise `DataError` if it is missing, damaged or of another
        version.
        """
        import bm25s

        folder = Path(folder)
        try:
            meta = read_json(folder / "meta.json")
            if meta["format"] != FORMAT:
                raise DataError(f"The index in {folder} is of another version; build it again.")
            lines = (folder / "passages.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
            kept = [Passage(*json.loads(line)) for line in lines]
            ranking = bm25s.BM25.load(str(folder), show_progress=False, allow_pickle=False)
            if ranking.scores["num_docs"] != len(kept):
                raise ValueError("it lacks passages")
        except CheckpointError:
            raise DataError(f"There is no index in {folder}; build one first.") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"The index in {folder} is damaged ({error}); build it again."
            ) from None
        return cls(kept, ranking, meta["source"])


def _allowed(document: Document, left_out: frozenset[str]) -> Iterator[tuple[Passage, str]]:
    """Yield the passages of a document that may be found."""
    if document.name in left_out:
        return
    for passage, matched in passages(document):
        if passage.path not in left_out:
            yield passage, matched
