"""Look up names in tables and optional packages, with error messages that suggest a fix."""

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from importlib import import_module
from typing import Any, TypeVar

from deepseek.errors import ConfigError, shown

T = TypeVar("T")


MAX_LISTED_NAMES = 12
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
    valid_names = sorted(set(names))
    match = _most_similar(name, valid_names)
    if match is None:
        return f"valid: {', '.join(valid_names)}"
    name_list = (
        f" (valid: {', '.join(valid_names)})" if len(valid_names) <= MAX_LISTED_NAMES else ""
    )
    return f"perhaps {match!r} is meant{name_list}"


def _most_similar(name: str, valid_names: list[str]) -> str | None:
    """Return the valid name that is most like `name`, None if none is.

    A name whose words begin with the letters of `name`, such as `learning_rate` for `lr`, comes
    first, then one of which `name` is a part, then one that is spelled alike.
    """
    folded_name = name.casefold()
    abbreviated = [candidate for candidate in valid_names if initials(candidate) == folded_name]
    if abbreviated:
        return abbreviated[0]
    if folded_name in map(str.casefold, valid_names):
        return next(candidate for candidate in valid_names if candidate.casefold() == folded_name)
    if len(folded_name) >= FEWEST_LETTERS:
        parts = [candidate for candidate in valid_names if folded_name in candidate.casefold()]
        if parts:
            return min(
                parts,
                key=lambda candidate: (
                    not candidate.casefold().startswith(folded_name),
                    len(candidate),
                ),
            )
    close = get_close_matches(
        folded_name, [candidate.casefold() for candidate in valid_names], n=1, cutoff=SIMILAR
    )
    return next(
        (candidate for candidate in valid_names if close and candidate.casefold() == close[0]), None
    )


def initials(name: str) -> str:
    """Return the first letters of the words of a name: `lr` for `--learning-rate`."""
    return "".join(word[:1] for word in re.split(r"[-_ ]+", name.casefold()))


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
