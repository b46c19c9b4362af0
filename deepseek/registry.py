"""Look up names in tables and optional packages, with error messages that suggest a fix."""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import Any, TypeVar

from deepseek.errors import ConfigError, shown

T = TypeVar("T")


LISTED = 12
"""Tables with more entries are listed in a message only if no entry is similar to the name."""


def nearest(name: str, names: Iterable[str]) -> str:
    """Return a hint for an unknown name: the most similar valid name, and a short list of all.

    Args:
        name: the unknown name.
        names: the valid names.
    """
    known = sorted(names)
    close = get_close_matches(name, known, n=1, cutoff=0.4)
    if not close:
        return f"valid: {', '.join(known)}"
    listed = f" (valid: {', '.join(known)})" if len(known) <= LISTED else ""
    return f"perhaps {close[0]!r} is meant{listed}"


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
        raise ConfigError(f"{what} {shown(name)} is unknown; {nearest(shown(name), table)}.")
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
