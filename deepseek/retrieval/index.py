"""BM25 index of passages, stored as a folder without code or pickles.

BM25 (Robertson and Zaragoza 2009, doi:10.1561/1500000019) by the library bm25s (arXiv:2407.03618).
"""

import json
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from deepseek.checkpoint.store import atomic_folder, read_json, write_json
from deepseek.data.text.document import Document
from deepseek.errors import CheckpointError, DataError
from deepseek.retrieval.passages import Passage, passages
from deepseek.retrieval.words import search_words

FORMAT = 4
"""Format version; increase it when the files or the results of `search_words` change."""
REBUILD = "build it again (an expert's with `deepseek expert index NAME`)"
"""Advice in errors about an index that cannot be used."""
DEFAULT_PASSAGES = 4
"""Passages to retrieve by default."""
CANDIDATES = 8
"""Ranked candidates per requested passage, since neighbours overlap and some exceed the budget."""

Length = Callable[[str], int]
"""Function that returns the length of a text in tokens."""


class Index:
    """Passages and the BM25 statistics that rank them.

    Attributes:
        passages: all passages.
        source: digest of the token shards that they were made from, or "".
    """

    def __init__(self, passages: list[Passage], ranking: Any, source: str = "") -> None:
        """Create an index from passages and the bm25s index over them, in the same order."""
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
            documents: documents to index.
            without: names of documents to exclude, along with their changes in commits.
            source: digest to store with the index.

        Raises:
            DataError: there is no text to index.
        """
        import bm25s

        excluded = frozenset(without)
        indexed: list[Passage] = []
        vocabulary: dict[str, int] = {}
        ids: list[list[int]] = []
        for document in documents:
            for passage, matched in _allowed(document, excluded):
                indexed.append(passage)
                words = search_words(matched)
                ids.append([vocabulary.setdefault(word, len(vocabulary)) for word in words])
        if not vocabulary:
            raise DataError("There is no text to index; give documents with words in them.")
        ranking = bm25s.BM25(backend="numpy")
        ranking.index((ids, vocabulary), show_progress=False)
        return cls(indexed, ranking, source)

    def rank(self, query: str, count: int) -> list[Passage]:
        """Return up to `count` best-matching passages, best first; each shares a word with the
        query.
        """
        word_ids = self._ranking.get_tokens_ids(search_words(query))
        if not word_ids:
            return []
        scores = self._ranking.get_scores_from_ids(word_ids)
        order = np.argsort(-scores, kind="stable")[:count]
        return [self.passages[place] for place in order.tolist() if scores[place] > 0]

    def retrieve(
        self,
        query: str,
        k: int = DEFAULT_PASSAGES,
        max_tokens: int | None = None,
        length: Length = len,
    ) -> list[Passage]:
        """Return up to `k` passages for a query, best first, without overlaps.

        Args:
            query: text to search with.
            k: maximum number of passages.
            max_tokens: budget for all passages together, as measured by `length`. Passages that
                don't fit are skipped, but the first one is truncated if at least a quarter of it
                fits. None: no limit.
            length: returns the tokens of a text; default: the number of characters.
        """
        chosen: list[Passage] = []
        budget = max_tokens
        for passage in self.rank(query, k * CANDIDATES):
            if len(chosen) == k:
                break
            if any(passage.overlaps(other) or passage.text == other.text for other in chosen):
                continue
            if budget is None:
                chosen.append(passage)
                continue
            size = length(passage.text)
            if size <= budget:
                chosen.append(passage)
                budget -= size
            elif not chosen and size <= 4 * budget:
                chosen.append(replace(passage, text=beginning(passage.text, budget, length)))
                budget -= length(chosen[0].text)
        return chosen

    def save(self, folder: str | Path) -> None:
        """Write the index atomically as a folder: passages as JSON lines, statistics as NumPy
        arrays.
        """
        with atomic_folder(folder) as temporary:
            self._ranking.save(str(temporary), show_progress=False)
            lines = (json.dumps(passage.as_json(), ensure_ascii=False) for passage in self.passages)
            (temporary / "passages.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
            write_json(temporary / "meta.json", {"format": FORMAT, "source": self.source})

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Load an index from the folder that `save` wrote.

        Raises:
            DataError: it is missing, damaged or of another version.
        """
        import bm25s

        folder = Path(folder)
        try:
            meta = read_json(folder / "meta.json")
            if not isinstance(meta, dict):
                raise ValueError("its meta.json is no JSON object")
            if meta.get("format") != FORMAT:
                raise DataError(f"The index in {folder} is of another version; {REBUILD}.")
            if not isinstance(meta.get("source"), str):
                raise ValueError("its meta.json names no source")
            lines = (folder / "passages.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
            loaded = [Passage(*json.loads(line)) for line in lines]
            ranking = bm25s.BM25.load(str(folder), show_progress=False, allow_pickle=False)
            if ranking.scores["num_docs"] != len(loaded):
                raise ValueError("it lacks passages")
        except CheckpointError:
            raise DataError(f"There is no index in {folder}; build one first.") from None
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"The index in {folder} is damaged ({error}); {REBUILD}.") from None
        return cls(loaded, ranking, meta["source"])


def beginning(text: str, most: int, length: Length) -> str:
    """Return the longest beginning of a text within a number of tokens.

    It ends with a whole line if that keeps at least half of what fits.

    Args:
        text: the text.
        most: maximum tokens, as measured by `length`.
        length: returns the tokens of a text.
    """
    least, stop = 0, len(text)  # characters that fit, and that do not
    while stop - least > 1:
        middle = (least + stop) // 2
        if length(text[:middle]) <= most:
            least = middle
        else:
            stop = middle
    lines = text.rfind("\n", 0, least) + 1
    return text[: lines if 2 * lines >= least else least]


def _allowed(document: Document, excluded: frozenset[str]) -> Iterator[tuple[Passage, str]]:
    """Yield the passages of a document that are not excluded, with the text that queries match."""
    if document.name in excluded:
        return
    for passage, matched in passages(document):
        if passage.path not in excluded:
            yield passage, matched
