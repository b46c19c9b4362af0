"""Look a name up in a literal table or among the installed packages, or say what is to be done."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import Any, TypeVar

from deepseek.errors import ConfigError

T = TypeVar("T")


LISTED = 12
"""Longer tables are not listed in a message, unless nothing in them is close."""


def nearest(name: str, names: Iterable[str]) -> str:
    """Return the likeliest meaning of `name` among `names`, with the whole list where that is
    short.
    """
    known = sorted(names)
    close = get_close_matches(name, known, n=1, cutoff=0.4)
    if not close:
        return f"valid: {', '.join(known)}"
    listed = f" (valid: {', '.join(known)})" if len(known) <= LISTED else ""
    return f"perhaps {close[0]!r} is meant{listed}"


def pick(table: Mapping[str, T], name: str, what: str) -> T:
    """Return `table[name]`; raise `ConfigError` naming `what`, the bad value and the nearest valid
    one.
    """
    try:
        return table[name]
    except KeyError:
        raise ConfigError(f"{what} {name!r} is unknown; {nearest(name, table)}.") from None


def package(name: str, install: str) -> Any:
    """Return a package that not every installation has; raise `ConfigError` saying what to
    `install` for it.
    """
    try:
        return import_module(name)
    except ImportError:
        raise ConfigError(f"This needs {name}; install it with pip install {install}.") from None
