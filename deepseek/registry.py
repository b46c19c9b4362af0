"""Look up names in tables and optional packages, with error messages that suggest a fix."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import Any, TypeVar

from deepseek.errors import ConfigError, shown

T = TypeVar("T")


LISTED = 12
"""Tables with more entries are listed in a message only if no entry is similar to the name."""


SIMILAR = 0.6
"""Least similarity of a suggestion, as `difflib` measures it; unrelated words reach 0.5."""

FEWEST_LETTERS = 2
"""Fewest letters of a name that counts as a part of another one."""


def nearest(name: str, names: Iterable[str]) -> str:
    """Return a hint for an unknown name: the most similar valid name, and a short list of all.

    Args:
        name: the unknown name.
        names: the valid names.
    """
    known = sorted(set(names))
    close = _most_similar(name, known)
    if close is None:
        return f"valid: {', '.join(known)}"
    listed = f" (valid: {', '.join(known)})" if len(known) <= LISTED else ""
    return f"perhaps {close!r} is meant{listed}"


def _most_similar(name: str, known: list[str]) -> str | None:
    """Return the valid name that is most like `name`, None if none is.

    A name of which `name` is a part, as a whole or from the beginning, comes before one that is
    spelled alike.
    """
    folded = name.casefold()
    if folded in map(str.casefold, known):
        return next(one for one in known if one.casefold() == folded)
    if len(folded) >= FEWEST_LETTERS:
        parts = [one for one in known if folded in one.casefold()]
        if parts:
            return min(parts, key=lambda one: (not one.casefold().startswith(folded), len(one)))
    close = get_close_matches(folded, [one.casefold() for one in known], n=1, cutoff=SIMILAR)
    return next((one for one in known if close and one.casefold() == close[0]), None)


def pick(table: Mapping[str, T], name: str, what: str) -> T:
    """Return `table[name]`.

    Args:
        table: the valid names and their values.
        name: the name to look up.
        what: kind of the name, such as "preset", for the error message.

    Raises:
        ConfigError: the name is not in the table.
    """
    if not isinstance(name, str) or name not in table:
        word = name if isinstance(name, str) else shown(name)
        raise ConfigError(f"{what} {shown(name)} is unknown; {nearest(word, table)}.")
    return table[name]


def package(name: str, install: str) -> Any:
    """Import and return an optional package.

    Args:
        name: name of the module.
        install: what to pass to `pip install`, for the error message.

    Raises:
        ConfigError: the package is not installed.
    """
    try:
        return import_module(name)
    except ImportError:
        raise ConfigError(f"This needs {name}; install it with pip install {install}.") from None
