"""Look a name up in a literal table, or say which name was probably meant."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TypeVar

from deepseek.errors import ConfigError

T = TypeVar("T")


def nearest(name: str, names: Iterable[str]) -> str:
    """Return `names` as a readable list that leads with the likeliest meaning of `name`."""
    known = sorted(names)
    close = get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}valid values: {', '.join(known)}"


def pick(table: Mapping[str, T], name: str, what: str) -> T:
    """Return `table[name]`; raise `ConfigError` naming `what`, the bad value and the nearest valid one."""
    try:
        return table[name]
    except KeyError:
        raise ConfigError(f"{what} {name!r} is unknown; {nearest(name, table)}.") from None
