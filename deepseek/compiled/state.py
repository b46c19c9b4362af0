"""Keys and values of one sequence for the compiled runner, in pages of 64 tokens."""

from dataclasses import dataclass

import numpy as np

from deepseek.compiled.abi import PAGE, RECENT
from deepseek.kernels.int8 import GROUP
from deepseek.model.experts.armed import ArmedExperts
from deepseek.runner import Segment

HUGE = 1 << 21
SLAB = 8  # most pages that a state gets at once

Page = np.ndarray  # bf16 as uint16, [layers * groups, 2, 64 * K]: keys [K/2, 64, 2], then values [K/64, 32, 64, 2]


def aligned(nbytes: int) -> np.ndarray:
    """Return zeroed memory `[nbytes]` that begins at a cache line.

    NumPy asks Linux for huge pages, whose addresses are found sooner, so what is large begins at one.
    """
    unit = 64 if nbytes < HUGE else HUGE
    memory = np.zeros(nbytes + unit, np.uint8)
    start = -memory.ctypes.data % unit
    return memory[start : start + nbytes]


@dataclass(frozen=True)
class PageShape:
    """Shape of a page: planes (layers x groups of heads), and the width of a head."""

    planes: int
    width: int

    @property
    def nbytes(self) -> int:
        return self.planes * 2 * PAGE * self.width * 2

    def new(self, count: int) -> list[Page]:
        """Return empty pages."""
        return list(aligned(count * self.nbytes).view(np.uint16).reshape(count, self.planes, 2, PAGE * self.width))

    def copy_token(self, source: Page, slot: int, target: Page, place: int) -> None:
        """Copy what one token left in `source` to another place."""
        keys, values = (self.planes, self.width // 2, PAGE, 2), (self.planes, self.width // GROUP, PAGE // 2, GROUP, 2)
        target[:, 0].reshape(keys)[:, :, place] = source[:, 0].reshape(keys)[:, :, slot]
        target[:, 1].reshape(values)[:, :, place // 2, :, place % 2] = source[:, 1].reshape(values)[
            :, :, slot // 2, :, slot % 2
        ]


@dataclass(frozen=True)
class PageSegment:
    """Tokens `start` to `stop - 1` of a sequence. The pages are shared: what is written there once never changes.

    pages: those that hold the tokens. sums: `[members, 3]` of the gates after the last one.
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
    """Pages of one sequence, its experts, and the running sums `[RECENT, members, 3]` of their gates.

    Attributes:
        length: number of tokens.
        addresses: where the pages lie.
    """

    rewinds = True

    def __init__(self, shape: PageShape, armed: ArmedExperts | None, members: int, capacity: int) -> None:
        self.shape, self.armed, self.capacity = shape, armed, capacity
        self.sums = np.zeros((RECENT, members, 3), np.float32)  # after position p at p % RECENT
        self.pages, self.addresses = list[Page](), list[int]()
        self.length = 0

    @property
    def nbytes(self) -> int:
        return len(self.pages) * self.shape.nbytes + self.sums.nbytes

    def reserve(self, count: int) -> None:
        """Make room for `count` more tokens."""
        missing = -(-(self.length + count) // PAGE) - len(self.pages)
        if missing > 0:
            rest = -(-self.capacity // PAGE) - len(self.pages)  # that it may ever need
            self._insert(len(self.pages), self.shape.new(max(missing, min(SLAB, rest))))

    def rewind(self, length: int) -> None:
        self.length = length

    def segment(self, start: int) -> PageSegment:
        pages = self.pages[start // PAGE : -(-self.length // PAGE)]
        return PageSegment(self.shape, tuple(pages), start, self.length, self._sums().copy())

    def extend(self, segment: Segment) -> None:
        assert isinstance(segment, PageSegment)
        token, first = segment.start, segment.start // PAGE
        while token < segment.stop:
            source = segment.pages[token // PAGE - first]
            if token % PAGE == 0 and self.length % PAGE == 0 and token + PAGE <= segment.stop:
                self._insert(self.length // PAGE, [source])
                step = PAGE
            else:
                self.reserve(1)
                self.shape.copy_token(source, token % PAGE, self.pages[self.length // PAGE], self.length % PAGE)
                step = 1
            self.length, token = self.length + step, token + step
        self._sums()[:] = segment.sums

    def _sums(self) -> np.ndarray:
        """The sums after the last token."""
        own: np.ndarray = self.sums[(self.length - 1) % RECENT]
        return own

    def _insert(self, place: int, pages: list[Page]) -> None:
        self.pages[place:place] = pages
        self.addresses[place:place] = [page.ctypes.data for page in pages]

    def close(self) -> None:
        self.pages, self.addresses, self.length = [], [], 0
