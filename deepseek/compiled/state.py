"""Paged key/value cache of one sequence for the compiled runner, in pages of 64 tokens."""

from dataclasses import dataclass

import numpy as np

from deepseek.compiled.abi import PAGE, RECENT, SUMS
from deepseek.kernels.int8 import GROUP
from deepseek.kernels.numba.buffers import aligned
from deepseek.model.experts.armed import ArmedExperts
from deepseek.runner import Segment

SLAB = 8  # maximum number of pages to allocate ahead of need

# Bytes. First keys and values, bf16 as uint16 [layers * groups, 2, 64 * K]: keys [K/2, 64, 2], then
# values [K/64, 32, 64, 2]. Behind them kappa of dynamic positions, if any, [layers * heads, 64] in
# fp32, and what it is relative to, [layers * heads] in fp64 (see `score_bias.py`).
Page = np.ndarray


@dataclass(frozen=True)
class PageShape:
    """Shape of a page.

    Attributes:
        planes: layers x key/value heads.
        width: width of a head.
        biases: layers x heads with forget gates; 0: no dynamic positions.
    """

    planes: int
    width: int
    biases: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of a page, in whole cache lines."""
        kappa = self.biases * (PAGE * 4 + 8)
        return self._memory_bytes + -(-kappa // 64) * 64

    @property
    def _memory_bytes(self) -> int:
        """Bytes of keys and values."""
        return self.planes * 2 * PAGE * self.width * 2

    def new(self, count: int) -> list[Page]:
        """Return `count` zeroed pages."""
        return list(aligned(count * self.nbytes).reshape(count, self.nbytes))

    def copy_token(self, source: Page, target: Page, slot: int) -> None:
        """Copy one token from `slot` of `source` to the same slot of `target`."""
        for there, here in zip(self._token(target, slot), self._token(source, slot), strict=True):
            there[:] = here

    def _token(self, page: Page, slot: int) -> tuple[np.ndarray, ...]:
        """Return views of a token's key, value and kappa in a page."""
        memory = page[: self._memory_bytes].view(np.uint16).reshape(self.planes, 2, -1)
        keys = memory[:, 0].reshape(self.planes, self.width // 2, PAGE, 2)
        values = memory[:, 1].reshape(self.planes, self.width // GROUP, PAGE // 2, GROUP, 2)
        start = self._memory_bytes
        stop = start + self.biases * PAGE * 4
        sums = page[start:stop].view(np.float32).reshape(self.biases, PAGE)
        return (
            keys[:, :, slot],
            values[:, :, slot // 2, :, slot % 2],
            sums[:, slot],
            page[stop : stop + self.biases * 8],
        )


@dataclass(frozen=True)
class PageSegment:
    """Tokens `start` to `stop - 1` of a sequence, in shared pages; slots of a page are written only
    once.

    Attributes:
        shape: shape of the pages.
        pages: the pages that hold the tokens.
        start, stop: positions of the first token, and past the last one.
        sums: running gate sums `[members, SUMS]` after the last token.
    """

    shape: PageShape
    pages: tuple[Page, ...]
    start: int
    stop: int
    sums: np.ndarray

    @property
    def nbytes(self) -> int:
        return self.shape.nbytes * (self.stop - self.start) // PAGE + self.sums.nbytes


class CompiledState:
    """Pages and running gate sums of one sequence.

    Args:
        shape: shape of a page.
        armed: the sequence's experts; None for the base alone.
        members: number of the experts' gates.
        capacity: maximum number of tokens.

    Attributes:
        length: number of tokens.
        pages: the pages, in order.
        addresses: addresses of the pages.
        sums: running gate sums `[RECENT, members, SUMS]`; those after position p are at p % RECENT.
    """

    def __init__(
        self, shape: PageShape, armed: ArmedExperts | None, members: int, capacity: int
    ) -> None:
        self.shape = shape
        self.armed = armed
        self.capacity = capacity
        self.sums = np.zeros((RECENT, members, SUMS), np.float32)
        self.pages: list[Page] = []
        self.addresses: list[int] = []
        self.length = 0

    @property
    def nbytes(self) -> int:
        return len(self.pages) * self.shape.nbytes + self.sums.nbytes

    def reserve(self, count: int) -> None:
        """Allocate pages for `count` more tokens."""
        missing = -(-(self.length + count) // PAGE) - len(self.pages)
        if missing > 0:
            # Until the capacity is reached.
            pages_left = -(-self.capacity // PAGE) - len(self.pages)
            self._insert(len(self.pages), self.shape.new(max(missing, min(SLAB, pages_left))))

    def rewind(self, length: int) -> None:
        self.length = length

    def segment(self, start: int) -> PageSegment:
        pages = self.pages[start // PAGE : -(-self.length // PAGE)]
        return PageSegment(self.shape, tuple(pages), start, self.length, self._sums().copy())

    def extend(self, segment: Segment) -> None:
        assert isinstance(segment, PageSegment) and segment.start == self.length
        token = segment.start
        first = segment.start // PAGE
        while token < segment.stop:
            source = segment.pages[token // PAGE - first]
            # Whole aligned pages are shared; other tokens are copied one by one.
            if token % PAGE == 0 and self.length % PAGE == 0 and token + PAGE <= segment.stop:
                self._insert(self.length // PAGE, [source])
                step = PAGE
            else:
                self.reserve(1)
                self.shape.copy_token(source, self.pages[token // PAGE], token % PAGE)
                step = 1
            self.length += step
            token += step
        self._sums()[:] = segment.sums

    def _sums(self) -> np.ndarray:
        """Return the running sums after the last token."""
        sums: np.ndarray = self.sums[(self.length - 1) % RECENT]
        return sums

    def _insert(self, place: int, pages: list[Page]) -> None:
        self.pages[place:place] = pages
        self.addresses[place:place] = [page.ctypes.data for page in pages]

    def close(self) -> None:
        self.pages = []
        self.addresses = []
        self.length = 0
