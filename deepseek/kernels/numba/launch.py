"""Handing tensors to a numba kernel that runs on torch's own threads.

A kernel is a C function of one pointer. `launch` writes addresses, shapes and numbers there,
`unpack` makes a tuple of arrays and numbers of them again. Between both stands a function in each
kernel's own module, for numba keeps compiled code by the file that it comes from:

    @cache
    def _kernel(kinds: str) -> int:
        return compiled(lambda data: _run(*unpack(data, kinds)))

A kernel of many arguments has tables of them (see `buffers.py`), which `reader` gives it as named
tuples.
"""

from collections.abc import Callable
from itertools import count
from typing import Any

import torch
from llvmlite import binding, ir
from numba import cfunc, types
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
    """Compiled code that calls nothing but its own copies of other functions.

    Otherwise the process that compiles a kernel runs copies that were optimized alone, and every
    later one, which loads the kernel from disk, those inside it: with fast arithmetic their last
    bits differ.
    """

    def _optimize_final_module(self) -> None:
        for function in self._final_module.functions:
            if function.linkage == binding.Linkage.linkonce_odr:
                function.linkage = binding.Linkage.internal
        super()._optimize_final_module()


class _KernelCompiler(Compiler):
    def __init__(self, typing: Any, target: Any, _library: None, *rest: Any) -> None:
        library = _Closed(target.codegen(), "kernel")
        library.enable_object_caching()
        super().__init__(typing, target, library, *rest)


def compiled(kernel: Callable[[Any], None]) -> int:
    """Compile a kernel, or load it from disk; return its address."""
    signature = types.void(types.CPointer(types.int64))
    return int(cfunc(signature, cache=True, pipeline_class=_KernelCompiler)(kernel).address)


def launch(kernel: Callable[[str], int], *arguments: Tensor | int) -> None:
    """Run a kernel on each of torch's threads, all with the same contiguous tensors and whole
    numbers.

    `kernel` returns the address of the C function for `kinds`: of each argument a letter and the
    number of dimensions, or "n" for a number.
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
    """Reads arguments one behind the other, in a function under construction."""

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
    """The arguments of `launch` as a tuple; bf16 numbers are the bits that an uint16 holds."""
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
    """Return the function that gives a kernel what `Table.arguments` wrote for each table, as a
    tuple of named tuples.

    The caller hands the numbers of all tables to `openmp.parallel`, in the same order. The result
    must be a global name of its module, so that numba finds the kernel's compiled code again.
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
