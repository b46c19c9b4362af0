"""Paged key/value cache of one sequence for the compiled runner, in pages of 64 tokens.

Each part of the layers has pages of its own, so that sequences with different experts can share
those of the lower layers (see `model/layer_parts.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from deepseek.compiled.abi import PAGE, RECENT, SUMS
from deepseek.compiled.page_shape import Page, PageShape
from deepseek.model.experts.armed import ArmedExperts
from deepseek.model.layer_parts import LayerPart
from deepseek.runner import Segment

AHEAD = 8  # maximum number of pages to allocate ahead of need


@dataclass(frozen=True)
class PageSegment:
    """Tokens `start` to `stop - 1` of a sequence at one part of the layers, in shared pages; slots
    of a page are written only once.

    Attributes:
        shape: shape of the pages; its layers identify the part.
        pages: the pages that hold the tokens.
        start, stop: positions of the first token, and past the last one.
        sums: running gate sums `[members of the part, SUMS]` after the last token.
        stream_TD: residual stream at the part's cut, fp32; None: the uppermost part.
    """

    shape: PageShape
    pages: tuple[Page, ...]
    start: int
    stop: int
    sums: np.ndarray
    stream_TD: np.ndarray | None

    @property
    def stream_bytes(self) -> int:
        return 0 if self.stream_TD is None else self.stream_TD.nbytes

    @property
    def nbytes(self) -> int:
        pages_bytes = self.shape.nbytes * (self.stop - self.start) // PAGE
        return pages_bytes + self.sums.nbytes + self.stream_bytes


class Entry(NamedTuple):
    """Where the next chunk enters the model.

    Attributes:
        part: index of the part whose keys and values the state already has; -1: none.
        stream_TD: residual stream of the chunk at that part's cut; None: the chunk enters at
            layer 0.
    """

    part: int
    stream_TD: np.ndarray | None


class PartState:
    """Pages of one part of the layers.

    Args:
        shape: shape of a page.
        members: the gates of the part among those of the sequence.

    Attributes:
        length: number of tokens.
        pages: the pages, in order.
        addresses: addresses of the pages (see `PageShape.address`).
    """

    def __init__(self, shape: PageShape, members: slice) -> None:
        self.shape = shape
        self.members = members
        self.length = 0
        self.pages: list[Page] = []
        self.addresses: list[int] = []

    def reserve(self, length: int, capacity: int) -> None:
        """Allocate pages for `length` tokens, `AHEAD` at a time within `capacity` tokens."""
        missing = -(-length // PAGE) - len(self.pages)
        if missing > 0:
            pages_left = -(-capacity // PAGE) - len(self.pages)
            self._insert(len(self.pages), self.shape.new(max(missing, min(AHEAD, pages_left))))

    def extend(self, segment: PageSegment, capacity: int) -> None:
        """Append the tokens of a segment."""
        assert segment.start == self.length
        token = segment.start
        first = segment.start // PAGE
        while token < segment.stop:
            source = segment.pages[token // PAGE - first]
            # Whole aligned pages are shared; other tokens are copied one by one.
            if token % PAGE == 0 and self.length % PAGE == 0 and token + PAGE <= segment.stop:
                self._insert(self.length // PAGE, [source])
                step = PAGE
            else:
                self.reserve(self.length + 1, capacity)
                self.shape.copy_token(source, self.pages[token // PAGE], token % PAGE)
                step = 1
            self.length += step
            token += step

    def _insert(self, place: int, pages: list[Page]) -> None:
        self.pages[place:place] = pages
        self.addresses[place:place] = map(self.shape.address, pages)


class CompiledState:
    """Pages and running gate sums of one sequence.

    Args:
        parts: the parts of the layers.
        shapes: shape of a page of each part.
        armed: the sequence's experts; None for the base alone.
        capacity: maximum number of tokens.

    Attributes:
        parts: pages of each part.
        cuts: layer at the upper end of each part but the last.
        sums: running gate sums `[RECENT, members, SUMS]`; those after position p are at p % RECENT.
    """

    def __init__(
        self,
        parts: Sequence[LayerPart],
        shapes: Sequence[PageShape],
        armed: ArmedExperts | None,
        capacity: int,
    ) -> None:
        self.armed = armed
        self.capacity = capacity
        self.cuts = [part.cut for part in parts if part.cut is not None]
        self.parts: list[PartState] = []
        stop = 0
        for part, shape in zip(parts, shapes, strict=True):
            start = stop
            stop += member_count(armed, part.gated)
            self.parts.append(PartState(shape, slice(start, stop)))
        self.sums = np.zeros((RECENT, stop, SUMS), np.float32)
        self._entries: dict[int, Entry] = {}

    @property
    def length(self) -> int:
        return self.parts[-1].length

    @property
    def nbytes(self) -> int:
        pages_bytes = sum(len(part.pages) * part.shape.nbytes for part in self.parts)
        streams = (entry.stream_TD for entry in self._entries.values())
        stream_bytes = sum(stream.nbytes for stream in streams if stream is not None)
        return pages_bytes + stream_bytes + self.sums.nbytes

    def reserve(self, count: int) -> None:
        """Allocate pages for `count` more tokens."""
        length = self.length + count
        for part in self.parts:
            part.reserve(length, self.capacity)

    def entry(self) -> Entry:
        """Return where the next chunk enters the model."""
        return self._entries.get(self.length, Entry(-1, None))

    def advance(self, count: int) -> None:
        """Count `count` more tokens in the layers that the last chunk was computed in."""
        entered = self._entries.pop(self.length, Entry(-1, None)).part
        length = self.length + count
        for part in self.parts[entered + 1 :]:
            part.length = length

    def rewind(self, length: int) -> None:
        for part in self.parts:
            part.length = length

    def segment(self, index: int, start: int, stream_TD: np.ndarray | None) -> PageSegment:
        """Return the state of the tokens from `start` on at part `index`.

        Args:
            index: index of the part.
            start: position of the first token.
            stream_TD: residual stream of these tokens at the part's cut; None: the uppermost part.
        """
        part = self.parts[index]
        pages = part.pages[start // PAGE : -(-part.length // PAGE)]
        sums = self._sums_at(part.length)[part.members].copy()
        return PageSegment(part.shape, tuple(pages), start, part.length, sums, stream_TD)

    def extend(self, segment: Segment) -> None:
        assert isinstance(segment, PageSegment)
        # The sequence that stored it may have had other parts: plugging an expert moves the cuts.
        index = [part.shape.layers for part in self.parts].index(segment.shape.layers)
        part = self.parts[index]
        part.extend(segment, self.capacity)
        self._sums_at(part.length)[part.members] = segment.sums
        if segment.stream_TD is None:
            self._entries.pop(segment.start, None)
        else:
            self._entries[segment.start] = Entry(index, segment.stream_TD)

    def _sums_at(self, length: int) -> np.ndarray:
        """Return the running sums after the first `length` tokens."""
        sums: np.ndarray = self.sums[(length - 1) % RECENT]
        return sums

    def close(self) -> None:
        for part in self.parts:
            part.pages = []
            part.addresses = []
            part.length = 0
        self._entries.clear()


def member_count(armed: ArmedExperts | None, layers: range) -> int:
    """Return the number of gates of a sequence at these layers: pairs of an expert and a layer."""
    if armed is None:
        return 0
    return sum(len(owners) for layer, owners in armed.roster.owners.items() if layer in layers)
