"""Launch numba kernels on torch's own threads, with tensors as arguments.

A kernel is a C function with one pointer argument. `launch` writes addresses, shapes and integers
to memory, and `unpack` turns them back into a tuple of arrays and integers. The function that
connects the two must be defined in each kernel's own module, because numba caches compiled code by
source file:

    @cache
    def _kernel(kinds: str) -> int:
        return compiled(lambda data: _run(*unpack(data, kinds)))

A kernel with many arguments declares tables of them (see `buffers.py`), which `reader` passes to it
as named tuples.
"""

from collections.abc import Callable, Hashable
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from llvmlite import binding, ir
from numba import types
from numba.core.caching import FunctionCache
from numba.core.ccallback import CFunc
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.extending import intrinsic
from numba.np.arrayobj import make_array, populate_array
from numba.np.numpy_support import from_dtype
from torch import Tensor

from deepseek.kernels.numba import openmp
from deepseek.kernels.numba.buffers import Table

LETTERS = {
    torch.float32: "f",
    torch.float64: "d",
    torch.bfloat16: "b",
    torch.int32: "i",
    torch.int64: "l",
}
ELEMENTS = {
    "f": types.float32,
    "d": types.float64,
    "b": types.uint16,
    "i": types.int32,
    "l": types.int64,
}


class _Closed(JITCodeLibrary):
    """A code library whose functions call only their own copies of other functions.

    Otherwise the process that compiles a kernel would run copies that were optimised separately,
    while every later process, which loads the kernel from the cache, would run the copies inside
    it. With fast-math, their last bits differ.
    """

    def _optimize_final_module(self) -> None:
        for function in self._final_module.functions:
            # Numba's optimiser removes calls that count references up and down again; it knows
            # these functions by name.
            counts_references = function.name.startswith("NRT_")
            if function.linkage == binding.Linkage.linkonce_odr and not counts_references:
                function.linkage = binding.Linkage.internal
                # The optimiser may now drop arguments. Under its own name, the linker would take
                # this copy for the function itself when other code calls that.
                function.name += ".closed"
        super()._optimize_final_module()


class _KernelCompiler(Compiler):
    """Numba's compiler with `_Closed` as its code library."""

    def __init__(self, typing: Any, target: Any, _library: None, *rest: Any) -> None:
        library = _Closed(target.codegen(), "kernel")
        library.enable_object_caching()
        super().__init__(typing, target, library, *rest)


class _KernelCache(FunctionCache):
    """Numba's cache with one more part in the key. Numba itself notices a change of the file that a
    kernel is defined in, but not of the files with the functions that it calls.
    """

    def __init__(self, kernel: Callable[[Any], None], source: Hashable) -> None:
        super().__init__(kernel)
        self._source = source

    def _index_key(self, *args: Any) -> Any:
        return (*super()._index_key(*args), self._source)


@cache
def kernel_sources(folder: Path = Path(__file__).parents[1]) -> int:
    """Return a checksum of all Python files of a folder; default: `deepseek/kernels`."""
    return crc32(b"".join(path.read_bytes() for path in sorted(folder.rglob("*.py"))))


def compiled(kernel: Callable[[Any], None], source: Hashable = None) -> int:
    """Compile a kernel, or load it from numba's cache; return its address.

    Args:
        kernel: function of the address of its arguments.
        source: part of the cache key that stands for the code of the kernel; if it changes, the
            kernel is recompiled. None: the checksum of all kernels (`kernel_sources`).
    """
    signature = ((types.CPointer(types.int64),), types.void)
    function: Any = CFunc(kernel, signature, locals={}, options={}, pipeline_class=_KernelCompiler)
    function._cache = _KernelCache(kernel, kernel_sources() if source is None else source)
    function.compile()
    return int(function.address)


def launch(kernel: Callable[[str], int], *arguments: Tensor | int) -> None:
    """Run a kernel on each of torch's threads, with the same arguments.

    Args:
        kernel: returns the address of the C function for a string of kinds: for each argument, a
            letter for the dtype and the number of dimensions, or "n" for an integer.
        arguments: contiguous tensors and integers.
    """
    kinds: list[str] = []
    numbers: list[int] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            kinds.append(f"{LETTERS[argument.dtype]}{argument.dim()}")
            numbers += [argument.data_ptr(), *argument.shape]
        else:
            kinds.append("n")
            numbers.append(argument)
    openmp.parallel(kernel(" ".join(kinds)), numbers)


class _Reader:
    """Emits code that reads consecutive arguments, in a function under construction."""

    def __init__(self, context: Any, builder: Any, data: Any) -> None:
        self.context = context
        self.builder = builder
        self.data = data
        self.places = count()

    def read(self, kind: Any) -> Any:
        return self._array(kind) if isinstance(kind, types.Array) else self._number()

    def _number(self) -> Any:
        place = ir.IntType(64)(next(self.places))
        return self.builder.load(self.builder.gep(self.data, [place]))

    def _array(self, kind: Any) -> Any:
        address = self._number()
        shape = [self._number() for _ in range(kind.ndim)]
        strides = [ir.IntType(64)(kind.dtype.bitwidth // 8)]
        for extent in reversed(shape[1:]):
            strides.insert(0, self.builder.mul(strides[0], extent))
        array = make_array(kind)(self.context, self.builder)
        start = self.builder.inttoptr(address, self.context.get_data_type(kind.dtype).as_pointer())
        populate_array(
            array, data=start, shape=shape, strides=strides, itemsize=strides[-1], meminfo=None
        )
        return array._getvalue()


@intrinsic(prefer_literal=True)
def unpack(_typing: Any, data: Any, kinds: Any) -> Any:
    """Return the arguments of `launch` as a tuple; bf16 numbers are the bits in a uint16."""
    words = kinds.literal_value.split()
    members = [
        types.int64 if word == "n" else types.Array(ELEMENTS[word[0]], int(word[1:]), "C")
        for word in words
    ]

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        reader = _Reader(context, builder, args[0])
        return context.make_tuple(
            builder, signature.return_type, [reader.read(kind) for kind in members]
        )

    return types.Tuple(members)(data, kinds), generate


def tuple_type(table: Table) -> Any:
    """Return numba's type of the named tuple that a kernel reads for a table."""
    members = [
        types.int64
        if buffer.is_number
        else types.Array(from_dtype(buffer.dtype), len(buffer.axes), "C")
        for buffer in table.buffers
    ]
    return types.BaseTuple.from_types(members, table.form)


def reader(*tables: Table) -> Any:
    """Return the function that gives a kernel the `Table.arguments` of each table, as a tuple of
    named tuples.

    The caller passes the numbers of all tables to `openmp.parallel`, in the same order. The result
    must be a global name of its module, so that numba finds the cached kernel again.

    Args:
        tables: the tables, in order.
    """
    forms = [tuple_type(table) for table in tables]

    @intrinsic
    def read(_typing: Any, data: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            arguments = _Reader(context, builder, args[0])
            tuples = [
                context.make_tuple(builder, form, [arguments.read(kind) for kind in form.types])
                for form in forms
            ]
            return context.make_tuple(builder, signature.return_type, tuples)

        return types.Tuple(forms)(data), generate

    return read
