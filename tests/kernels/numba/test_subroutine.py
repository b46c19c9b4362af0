"""A subroutine computes the same as a function compiled by `numba.njit`, in kernels and from
Python, for every type of its arguments.
"""

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.kernels.numba.subroutine import subroutine


def _polynomial(x: float, times: int) -> float:
    total = x
    for i in range(times):
        total = total * x + i
    return total


def _nested(x: float) -> float:
    return inner(x, 3) + inner(x * x, 2)


inner = subroutine(error_model="numpy")(_polynomial)
outer = subroutine(_nested)
compiled = numba.njit(_polynomial)


@numba.njit
def kernel(values: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(values)):
        out[i] = outer(values[i])


@given(values=st.lists(st.integers(-8, 8), min_size=1, max_size=20))
@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int64])
def test_a_kernel_calls_it_as_it_would_call_a_compiled_function(
    kind: type, values: list[int]
) -> None:
    given_values = np.array(values, kind)
    out = np.empty(len(values), np.float64)
    kernel(given_values, out)
    wanted = [compiled(x, 3) + compiled(x * x, 2) for x in given_values]
    assert out.tolist() == wanted


def test_it_can_be_called_from_python() -> None:
    assert inner(2.0, 3) == _polynomial(2.0, 3)
    assert inner(np.int64(3), 2) == _polynomial(3, 2)


def test_what_it_cannot_compile_is_said_where_a_kernel_uses_it() -> None:
    broken = subroutine(lambda x: x.nothing)

    @numba.njit
    def calls(x: float) -> float:
        return broken(x)  # type: ignore[no-any-return]

    with pytest.raises(numba.TypingError, match="nothing"):
        calls(1.0)
