"""Layout of a page: keys and values of 64 tokens of one sequence, and the state beside them."""

from dataclasses import dataclass

import numpy as np

from deepseek.compiled.abi import PAGE
from deepseek.kernels.int8_layout import GROUP
from deepseek.kernels.numba.buffers import aligned

# Bytes: the layers one after another, each with the parts that `PageShape` lists, in order.
Page = np.ndarray


@dataclass(frozen=True)
class PageShape:
    """Shape of a page.

    A layer has these parts in a page:

    - keys and values, bf16 as uint16 `[groups, 2, 64 * K]`: keys `[K/2, 64, 2]`, then values
      `[K/64, 32, 64, 2]`. With LSH attention, which reads single tokens: `[groups, 64, 2, K]`.
    - kappa of dynamic positions, if any: `[heads, 64]` in fp32, and what it is relative to,
      `[heads]` in fp64 (see `score_bias.py`).
    - buckets of the keys in a model with LSH attention: uint16 `[groups, rounds, 64]`.
    - for a far field, sums of the keys and of the values of this page and all before it, fp64
      `[groups, 2, K]`, once the page is full (see `far_field.py`).

    Attributes:
        layers: the layers whose keys and values it holds.
        groups: key/value heads of a layer.
        width: width of a head.
        biases: heads of a layer with forget gates; 0: no dynamic positions.
        hashed: layers with LSH attention.
        rounds: rounds of hashing; 0: no LSH attention.
        far_field: whether there is a far field.
    """

    layers: range
    groups: int
    width: int
    biases: int = 0
    hashed: tuple[int, ...] = ()
    rounds: int = 0
    far_field: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of a page."""
        return len(self.layers) * self.layer_bytes

    @property
    def layer_bytes(self) -> int:
        """Bytes of a layer in a page, in whole cache lines."""
        return _whole_lines(self.sums_start + self.far_field * self.groups * 2 * self.width * 8)

    @property
    def codes_start(self) -> int:
        """Where the buckets start in a layer."""
        return _whole_lines(self._kappa_start + self.biases * (PAGE * 4 + 8))

    @property
    def sums_start(self) -> int:
        """Where the sums of the far field start in a layer."""
        return self.codes_start + self.groups * self.rounds * PAGE * 2

    @property
    def _kappa_start(self) -> int:
        return self.groups * 2 * PAGE * self.width * 2

    def new(self, count: int) -> list[Page]:
        """Return `count` zeroed pages, each of which can be freed by itself."""
        return [aligned(self.nbytes) for _ in range(count)]

    def address(self, page: Page) -> int:
        """Return the address that layer 0 would have, if the layers below were in the page too."""
        address: int = page.ctypes.data
        return address - self.layers.start * self.layer_bytes

    def copy_token(self, source: Page, target: Page, slot: int) -> None:
        """Copy one token from `slot` of `source` to the same slot of `target`."""
        for there, here in zip(self._token(target, slot), self._token(source, slot), strict=True):
            there[:] = here

    def _token(self, page: Page, slot: int) -> list[np.ndarray]:
        """Return views of a token's data in a page, and of the data that a page holds once."""
        layers = page.reshape(len(self.layers), self.layer_bytes)
        kappa_stop = self._kappa_start + self.biases * PAGE * 4
        kappa = layers[:, self._kappa_start : kappa_stop].view(np.float32)
        codes = layers[:, self.codes_start : self.sums_start].view(np.uint16)
        return [
            *self._memory(layers, slot),
            kappa.reshape(len(layers), self.biases, PAGE)[:, :, slot],
            layers[:, kappa_stop : kappa_stop + self.biases * 8],
            codes.reshape(len(layers), self.groups * self.rounds, PAGE)[:, :, slot],
            layers[:, self.sums_start :],
        ]

    def _memory(self, layers: np.ndarray, slot: int) -> list[np.ndarray]:
        """Return views of a token's keys and values in the layers of a page."""
        memory = layers[:, : self._kappa_start].view(np.uint16)
        views = []
        for place, layer in enumerate(self.layers):
            own = memory[place].reshape(self.groups, 2, PAGE * self.width)
            if layer in self.hashed:
                views.append(own.reshape(self.groups, PAGE, 2 * self.width)[:, slot])
                continue
            keys = own[:, 0].reshape(self.groups, self.width // 2, PAGE, 2)
            values = own[:, 1].reshape(self.groups, self.width // GROUP, PAGE // 2, GROUP, 2)
            views += [keys[:, :, slot], values[:, :, slot // 2, :, slot % 2]]
        return views


def _whole_lines(nbytes: int) -> int:
    """Return the number of bytes, rounded up to whole cache lines."""
    return -(-nbytes // 64) * 64
