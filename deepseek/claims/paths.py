"""Look up figures in a result file by path."""

from collections.abc import Callable, Iterator
from operator import sub, truediv
from typing import TypeAlias

from deepseek.claims.declaration import Side

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

OPERATIONS: dict[str, Callable[[float, float], float]] = {"minus": sub, "over": truediv}


def lookup(record: Json, path: str) -> Json:
    """Return the value at `path`, keys joined by "/".

    Raises:
        KeyError: there is no value.
    """
    for key in path.split("/"):
        if isinstance(record, dict):
            record = record[key]
        elif isinstance(record, list) and key.isdigit() and int(key) < len(record):
            record = record[int(key)]
        else:
            raise KeyError(path)
    return record


def numbers(record: Json, side: Side) -> list[float]:
    """Return the numbers of a side: several if its path has a "*".

    Raises:
        KeyError: the record does not hold them.
    """
    if isinstance(side, str):
        return list(_numbers_at(record, side))
    first, operation, second = side
    if operation == "or":
        try:
            return numbers(record, first)
        except KeyError:
            return numbers(record, second)
    return paired(OPERATIONS[operation], numbers(record, first), numbers(record, second))


def paired(
    operation: Callable[[float, float], float], left: list[float], right: list[float]
) -> list[float]:
    """Apply an operation to pairs of numbers; a single right number is paired with every left
    one.
    """
    rights = right * len(left) if len(right) == 1 else right
    return [operation(*pair) for pair in zip(left, rights, strict=True)]


def _numbers_at(record: Json, path: str) -> Iterator[float]:
    before, star, after = path.partition("*")
    if not star:
        value = lookup(record, path)
        if not isinstance(value, int | float):
            raise KeyError(path)
        yield float(value)
        return
    group = lookup(record, before.rstrip("/")) if before else record
    for part in _parts(group):
        if after:
            yield from _numbers_at(part, after.lstrip("/"))
        elif isinstance(part, int | float):
            yield float(part)
        else:
            raise KeyError(path)


def _parts(group: Json) -> list[Json]:
    if isinstance(group, dict):
        return list(group.values())
    if isinstance(group, list):
        return group
    raise KeyError("*")
