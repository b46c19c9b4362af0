"""Pack the matrices of a model block by block, from memory or from the checkpoint's files."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from deepseek.compiled.abi import BY_TILES, FOUR_BITS
from deepseek.kernels.int8 import BLOCK_ELEMENTS, Int8Matrix, pack, packed_bytes, quantize
from deepseek.kernels.int8_layout import GROUP
from deepseek.kernels.numba import amx
from deepseek.kernels.numba.buffers import aligned
from deepseek.model.quantised import kept_matrix
from deepseek.model.stored import StoredEmbedding, StoredLinear

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class MatrixSource:
    """A matrix `[F, D]` to pack.

    Attributes:
        outputs: F.
        width: D.
        bits: bits of its values, 8 or 4.
        rows: returns rows `first` to `last - 1`, quantised.
    """

    outputs: int
    width: int
    bits: int
    rows: Callable[[int, int], Int8Matrix]

    def part(self, start: int, stop: int) -> "MatrixSource":
        """Return the matrix of outputs `start` to `stop - 1`."""
        return MatrixSource(
            stop - start,
            self.width,
            self.bits,
            lambda first, last: self.rows(start + first, start + last),
        )


def source_of(layer: nn.Module) -> MatrixSource:
    """Return the weight of a linear layer or embedding; it is quantised on packing if need be."""
    if isinstance(layer, StoredLinear | StoredEmbedding):
        stored = layer.stored

        def stored_rows(first: int, last: int) -> Int8Matrix:
            matrix = stored.quantised(first, last)
            return quantize(stored.rows(first, last)) if matrix is None else matrix

        return MatrixSource(stored.shape[0], stored.shape[1], stored.bits or 8, stored_rows)
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    matrix = kept_matrix(layer, "weight")
    return matrix_source(weight.detach()) if matrix is None else quantised_source(matrix)


def quantised_source(matrix: Int8Matrix) -> MatrixSource:
    """Return a matrix that is packed as it is."""
    return MatrixSource(len(matrix.values), matrix.width, matrix.bits, matrix.rows)


def matrix_source(weight_FD: torch.Tensor) -> MatrixSource:
    """Return a matrix that is quantised to 8 bits when it is packed."""
    outputs, width = weight_FD.shape
    return MatrixSource(outputs, width, 8, lambda first, last: quantize(weight_FD[first:last]))


def concatenate(sources: Sequence[MatrixSource]) -> MatrixSource:
    """Return several matrices of the same width as one, with their outputs in order.

    If their bits differ, all of them are packed with 8.
    """

    def rows(first: int, last: int) -> Int8Matrix:
        parts = []
        start = 0
        for source in sources:
            begin = max(first - start, 0)
            end = min(last - start, source.outputs)
            if begin < end:
                parts.append(source.rows(begin, end))
            start += source.outputs
        values = torch.cat([part.values for part in parts])
        return Int8Matrix(values, torch.cat([part.scales for part in parts]), sources[0].width)

    outputs = sum(source.outputs for source in sources)
    return MatrixSource(outputs, sources[0].width, max(source.bits for source in sources), rows)


def pack_matrices(matrices: Mapping[Key, Sequence[MatrixSource]]) -> dict[Key, np.ndarray]:
    """Return packed matrices under the same keys, one after another in one block of memory.

    Args:
        matrices: one matrix to pack, or a gate projection and an up projection.
    """
    sizes = {key: _packed_bytes(sources) for key, sources in matrices.items()}
    memory = aligned(sum(sizes.values()))
    parts = {}
    start = 0
    for key, sources in matrices.items():
        parts[key] = memory[start : start + sizes[key]]
        _pack_into(parts[key], sources)
        start += sizes[key]
    return parts


def tagged_address(panels: np.ndarray, bits: int) -> int:
    """Return the address of packed matrices with the marks of `compiled/abi.py`."""
    address: int = panels.ctypes.data
    return address + (FOUR_BITS if bits == 4 else 0) + (BY_TILES if amx.available() else 0)


def bits_of(sources: Sequence[MatrixSource]) -> int:
    """Return the bits of matrices that are packed together."""
    return max(source.bits for source in sources)


def _packed_bytes(sources: Sequence[MatrixSource]) -> int:
    return packed_bytes(
        [source.outputs for source in sources], sources[0].width, bits=bits_of(sources)
    )


def _pack_into(memory: np.ndarray, sources: Sequence[MatrixSource]) -> None:
    """Fill memory with panels, a block of outputs at a time."""
    outputs = sources[0].outputs
    step = max(1, BLOCK_ELEMENTS // (sources[0].width * GROUP)) * GROUP
    start = 0
    for first in range(0, outputs, step):
        last = min(first + step, outputs)
        panels = pack([source.rows(first, last) for source in sources], bits_of(sources)).reshape(
            -1
        )
        memory[start : start + len(panels)] = panels
        start += len(panels)
