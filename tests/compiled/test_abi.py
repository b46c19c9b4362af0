"""The ABI tables of the compiled step agree with the arrays, the arguments and the tuple that the
kernel reads.
"""

import ast
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numba import njit, types
from numba.core.typing.typeof import typeof

from deepseek.compiled import step
from deepseek.compiled.abi import TABLES
from deepseek.kernels.numba import launch, openmp
from deepseek.kernels.numba.buffers import BF16, FP32, INT64, Buffer, Table

PAIR = Table(
    "Pair",
    (
        Buffer("factor", INT64, "", "a number"),
        Buffer("matrix", FP32, "rows columns+1", "an array"),
        Buffer("ids", INT64, "rows", "a list"),
        Buffer("addends", INT64, "rows columns", "a list for two axes"),
    ),
)
BITS = Table(
    "Bits",
    (Buffer("bits", BF16, "2 columns", "bf16 as bits"), Buffer("out", FP32, "rows", "the result")),
)
EXTENTS = {"rows": 2, "columns": 3}


def values(**changes: Any) -> dict[str, Any]:
    matrix = np.arange(8, dtype=np.float32).reshape(2, 4)
    # Not in the table's order, which is the one that counts.
    return {"addends": [*range(100, 106)], "ids": [1, 0], "matrix": matrix, "factor": 10} | changes


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_the_kernels_tuple_has_the_dtype_and_axes_of_every_row(table: Table) -> None:
    form = launch.tuple_type(table)
    assert form.instance_class is table.form
    assert form.fields == tuple(buffer.name for buffer in table.buffers)
    extents = {name: 1 for buffer in table.buffers for name, _ in buffer.axes}
    arrays = table.zeros(extents)
    for buffer, kind in zip(table.buffers, form.types, strict=True):
        if buffer.is_number:
            assert kind == types.int64
        else:
            passed = typeof(arrays[buffer.name])
            assert (kind.dtype, kind.ndim, kind.layout) == (
                passed.dtype,
                passed.ndim,
                passed.layout,
            )
            assert arrays[buffer.name].ctypes.data % 64 == 0


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_names_are_unique_and_every_row_says_what_it_holds(table: Table) -> None:
    assert len({buffer.name for buffer in table.buffers}) == len(table.buffers)
    assert all(buffer.meaning for buffer in table.buffers)


read_pair = launch.reader(PAIR, BITS)


@njit
def _multiply(pair, bits):  # type: ignore[no-untyped-def]
    for r in range(len(bits.out)):
        last = pair.matrix[pair.ids[r], pair.matrix.shape[1] - 1]
        bits.out[r] = pair.factor * last + bits.bits[1, r] + pair.addends[r, 2]


def test_a_kernel_reads_what_the_tables_hand_over() -> None:
    def kernel(data):  # type: ignore[no-untyped-def]
        pair, bits = read_pair(data)
        _multiply(pair, bits)

    filled = BITS.zeros(EXTENTS)
    filled["bits"][:] = [[1, 2, 3], [4, 5, 6]]
    groups = [PAIR.arguments(values(), EXTENTS), BITS.arguments(filled, EXTENTS)]
    openmp.parallel(
        launch.compiled(kernel), [number for group in groups for number in group.numbers]
    )
    assert filled["out"].tolist() == [10 * 7 + 4 + 102, 10 * 3 + 5 + 105]


def test_a_buffer_is_added_by_one_row() -> None:
    more = replace(PAIR, buffers=(Buffer("bias", FP32, "columns", "new"), *PAIR.buffers))
    bias = np.zeros(3, np.float32)
    numbers = more.arguments(values(bias=bias), EXTENTS).numbers
    assert numbers[:3] == [bias.ctypes.data, 3, 10]
    assert launch.tuple_type(more).fields == ("bias", *launch.tuple_type(PAIR).fields)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"matrix": np.zeros((2, 4))},
            r"Pair.matrix has dtype float64 .* reads float32 of shape \(2, 4\)",
        ),
        (
            {"matrix": np.zeros((2, 3), np.float32)},
            r"shape \(2, 3\); .* shape \(2, 4\) \(rows columns\+1\)",
        ),
        ({"matrix": np.zeros((4, 2), np.float32).T}, "Pair.matrix is not contiguous"),
        ({"matrix": 5}, r"Pair.matrix has dtype int64 and shape \(\)"),
        (
            {"ids": [1, 0, 2]},
            r"Pair.ids has .* shape \(3,\); the kernel reads int64 of shape \(2,\) \(rows\)",
        ),
        (
            {"factor": [10]},
            r"Pair.factor has .* shape \(1,\); the kernel reads int64 of shape \(\) \(a number\)",
        ),
        ({"bias": 1}, "the names of its buffers; they differ in bias"),
    ],
)
def test_what_does_not_fit_a_table_is_refused_in_one_sentence(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        PAIR.arguments(values(**changes), EXTENTS)
    assert "\n" not in str(error.value)


def imported_files(file: Path) -> set[Path]:
    """Return the package's files that a kernel's file imports, except those that only provide
    constants.
    """
    files = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("deepseek."):
            for alias in node.names:
                source = (
                    sys.modules.get(f"{node.module}.{alias.name}") or sys.modules[str(node.module)]
                )
                files.add(Path(str(source.__file__)))
    constants = {Path(str(sys.modules["deepseek.model.experts.gate"].__file__))}
    return files - constants


def test_a_change_in_any_file_of_the_step_compiles_it_anew() -> None:
    known = {step.PACKAGE / name for name in step.SOURCES}
    assert Path(step.__file__) in known
    for file in known:
        assert imported_files(file) <= known, f"{file} imports a file that `SOURCES` does not name"
