"""Tables of buffers: the single declaration of the arguments of a kernel.

A `Table` lists buffers in order, each with its dtype and shape. It defines the arguments that a
caller passes (`Table.arguments`, which validates them), zeroed memory (`Table.zeros`), and the
named tuple that the kernel reads (`launch.reader`). So a buffer is added by adding one row.
"""

import math
from collections import namedtuple
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

INT64 = np.dtype(np.int64)
FP32 = np.dtype(np.float32)
BF16 = np.dtype(np.uint16)  # NumPy has no bf16; arrays hold the bits of the numbers

HUGE = 1 << 21  # bytes of a huge page

Extents = Mapping[str, int]
Value = int | list[int] | np.ndarray


def aligned(nbytes: int) -> np.ndarray:
    """Return zeroed memory `[nbytes]`, aligned to a cache line or a huge page.

    Large arrays start at a huge page. NumPy asks Linux for huge pages, which reduce TLB misses.

    Args:
        nbytes: size in bytes.
    """
    unit = 64 if nbytes < HUGE else HUGE
    memory = np.zeros(nbytes + unit, np.uint8)
    start = -memory.ctypes.data % unit
    return memory[start : start + nbytes]


@dataclass(frozen=True)
class Buffer:
    """One row of a table: an array, or an integer if `shape` is empty.

    Attributes:
        name: name of the field that the kernel reads.
        dtype: dtype of the elements.
        shape: names of the extents, separated by spaces; "layers+1" is one more than `layers`, "2"
            is 2.
        meaning: description of the content.
    """

    name: str
    dtype: np.dtype[Any]
    shape: str
    meaning: str

    @cached_property
    def axes(self) -> list[tuple[str, int]]:
        """Name and increment of the extent of each axis; a fixed extent has the name ""."""
        terms = [axis.partition("+") for axis in self.shape.split()]
        return [
            ("", int(name)) if name.isdecimal() else (name, int(more or 0))
            for name, _, more in terms
        ]

    @property
    def is_number(self) -> bool:
        """Whether the buffer is an integer."""
        return not self.axes

    def extent(self, extents: Extents) -> tuple[int, ...]:
        """Return the shape as numbers."""
        return tuple(extents[name] + more if name else more for name, more in self.axes)


class KernelArguments(NamedTuple):
    """The arguments described by one table.

    Attributes:
        numbers: integers, and the address and shape of each array, in the order that
            `launch.reader` reads.
        arrays: the arrays at those addresses; they must stay alive until the kernel has run.
    """

    numbers: list[int]
    arrays: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Table:
    """The buffers of a kernel, in order.

    Attributes:
        name: name of the named tuple that the kernel reads.
        buffers: the rows of the table.
    """

    name: str
    buffers: tuple[Buffer, ...]

    @cached_property
    def form(self) -> Any:
        """Class of the named tuple."""
        return namedtuple(self.name, [buffer.name for buffer in self.buffers])

    def zeros(self, extents: Extents) -> dict[str, np.ndarray]:
        """Return a zeroed array for each buffer."""
        arrays = {}
        for buffer in self.buffers:
            shape = buffer.extent(extents)
            memory = aligned(buffer.dtype.itemsize * math.prod(shape))
            arrays[buffer.name] = memory.view(buffer.dtype).reshape(shape)
        return arrays

    def arguments(self, values: Mapping[str, Value], extents: Extents) -> KernelArguments:
        """Return the kernel's arguments for the given values.

        Lists of integers are copied into one common array, which is faster than an array for each.

        Args:
            values: name of each buffer -> its value.
            extents: name of each extent -> its size.

        Raises:
            ValueError: a value is missing, unknown or not contiguous, or its dtype or shape differs
                from the table's.
        """
        if values.keys() != self._names:
            wrong = ", ".join(sorted(values.keys() ^ self._names))
            raise ValueError(
                f"The values for {self.name} do not have the names of its buffers; "
                f"they differ in {wrong}."
            )
        ordered = [values[buffer.name] for buffer in self.buffers]
        memory = np.array(
            [*chain.from_iterable(value for value in ordered if isinstance(value, list))], np.int64
        )
        address = memory.ctypes.data
        numbers: list[int] = []
        arrays = [memory]
        for buffer, value in zip(self.buffers, ordered, strict=True):
            shape = buffer.extent(extents)
            if isinstance(value, list):
                self._check(buffer, INT64, (len(value),), (math.prod(shape),) if shape else ())
                numbers += [address, *shape]
                address += memory.itemsize * len(value)
            elif isinstance(value, np.ndarray):
                self._check(buffer, value.dtype, value.shape, shape)
                if not value.flags.c_contiguous:
                    raise ValueError(
                        f"{self.name}.{buffer.name} is not contiguous, as the kernel requires."
                    )
                numbers += [value.ctypes.data, *shape]
                arrays.append(value)
            else:
                self._check(buffer, INT64, (), shape)
                numbers.append(value)
        return KernelArguments(numbers, tuple(arrays))

    @cached_property
    def _names(self) -> set[str]:
        return {buffer.name for buffer in self.buffers}

    def _check(
        self,
        buffer: Buffer,
        dtype: np.dtype[Any],
        shape: tuple[int, ...],
        expected_shape: tuple[int, ...],
    ) -> None:
        if dtype != buffer.dtype or shape != expected_shape:
            raise ValueError(
                f"{self.name}.{buffer.name} has dtype {dtype} and shape {shape}; the kernel reads "
                f"{buffer.dtype} of shape {expected_shape} ({buffer.shape or 'a number'})."
            )
