"""Functions of kernels that differ by dtype."""

from typing import Any

from numba import types
from numba.extending import overload


def by_dtype(full: Any, half: Any) -> Any:
    """Return a function for kernels that calls `half` if its first argument is an array of bf16
    numbers, and `full` otherwise.
    """

    def chosen(array, *rest):  # type: ignore[no-untyped-def]
        raise NotImplementedError("only kernels can call this")

    @overload(chosen)
    def choose(array, *rest):  # type: ignore[no-untyped-def] # noqa: ARG001
        function = half if array.dtype == types.uint16 else full
        return lambda array, *rest: function(array, *rest)  # noqa: PLW0108

    return chosen
