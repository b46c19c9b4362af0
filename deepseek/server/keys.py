"""API keys: their permissions, and the files that list them.

This module imports nothing heavy, for the command line.
"""

import hmac
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deepseek.errors import ConfigError, shown
from deepseek.packs.names import valid_name

NO_EXPERT = "-"
"""Written after a key that may use no expert."""

Experts = frozenset[str] | None
"""Names of the experts that a key may use; None: all, including those plugged later."""


@dataclass(frozen=True)
class Permissions:
    """What the holder of a key may do.

    Attributes:
        role: "admin" may change the server and send requests, "user" only the latter.
        experts: names of the experts that requests may use; None (default): all.
    """

    role: Literal["admin", "user"]
    experts: Experts = None

    @property
    def label(self) -> str:
        """A text that is unique to these permissions."""
        if self.experts is None:
            return self.role
        return " ".join([self.role, "of", *sorted(self.experts)])


Known = Sequence[tuple[str, Permissions]]
"""Permissions by secret."""


def sessions(secret: str, permissions: Iterable[Permissions]) -> Known:
    """Return a session cookie for each of the given permissions.

    Args:
        secret: secret of the server; replicas that share it have the same cookies.
        permissions: the permissions; those that occur several times share a cookie.
    """
    return [
        (hmac.digest(secret.encode(), each.label.encode(), "sha256").hex(), each)
        for each in dict.fromkeys(permissions)
    ]


def permissions_of(candidate: str, known: Known) -> Permissions | None:
    """Return the permissions of a secret (the first, if there are several); None for a wrong one.

    The comparison takes constant time, so that the time reveals nothing about the secrets.

    Args:
        candidate: the key or session cookie that the client sent.
        known: the secrets.
    """
    sent = candidate.encode()
    found = [each for secret, each in known if hmac.compare_digest(sent, secret.encode())]
    return found[0] if found else None


def read_keys(file: Path | None, variable: str, option: str) -> dict[str, Experts]:
    """Return the keys in a file and in an environment variable, with the experts of each.

    A line of the file is a key, and may continue with the names of the experts that it may use,
    separated by spaces, or with `NO_EXPERT`. Empty lines and those that begin with # are skipped.
    A key alone may use all experts, and so may that of the variable.

    Args:
        file: the file; None: only the variable is read.
        variable: name of the environment variable, which holds one key or none.
        option: option that named the file, for messages. They never show a key.

    Raises:
        ConfigError: the file cannot be read, a line of it is invalid, a key cannot be sent or
            stands there twice with different experts, or there is none in the file: continuing
            without keys would open the server to everyone.
    """
    variable_key = os.environ.get(variable, "").strip()
    if variable_key:
        _check_key(variable_key, variable)
    keys: dict[str, Experts] = {variable_key: None} if variable_key else {}
    if file is None:
        return keys
    try:
        lines = [line.split() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{option} {file} cannot be read ({error}); give a text file with one key per line."
        ) from None
    numbered = [(n, line) for n, line in enumerate(lines, 1) if line and line[0][0] != "#"]
    if not numbered:
        raise ConfigError(
            f"{option} {file} holds no key; write one key per line into it, or leave the option "
            "out."
        )
    for number, (key, *names) in numbered:
        place = f"{option} {file}, line {number}"
        _check_key(key, place)
        experts = _experts(names, place)
        if keys.setdefault(key, experts) != experts:
            raise ConfigError(
                f"{place}: this key has other experts on another line or in {variable}; keep one "
                "of the two."
            )
    return keys


def read_admin_keys(file: Path | None, variable: str, option: str) -> frozenset[str]:
    """Return the keys of administrators, who may use every expert.

    Args:
        file, variable, option: see `read_keys`.

    Raises:
        ConfigError: as `read_keys`, or a line names experts.
    """
    keys = read_keys(file, variable, option)
    if any(experts is not None for experts in keys.values()):
        raise ConfigError(
            f"{option} {file} names experts after a key, but administrators may use all; write "
            "one key per line, without names."
        )
    return frozenset(keys)


def checked_keys(name: str, value: Any) -> frozenset[str]:
    """Return keys, each of which can be sent in a header.

    Args:
        name: the field that holds them, for messages, which never show a key.
        value: a collection of texts.

    Raises:
        ConfigError: it is another type, such as one text, each character of which would be a key,
            or a key cannot be sent.
    """
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise ConfigError(
            f"{name} is a {type(value).__name__}, not a collection of keys; give a single key as "
            f"frozenset({{key}})."
        )
    keys = list(value)
    for key in keys:
        _check_key(key, name)
    return frozenset(keys)


def _check_key(key: Any, place: str) -> None:
    """Check that a key can be sent in a header, where clients encode other characters differently.

    Args:
        key: the key.
        place: where it stands, for messages.

    Raises:
        ConfigError: it cannot, or anyone could send it because it is empty.
    """
    # White space around what a client sends is removed, so such a key would match nothing.
    if not isinstance(key, str) or not key or key != key.strip():
        raise ConfigError(
            f"{place}: a key is empty, begins or ends with white space, or is no text; give a "
            "text that is hard to guess."
        )
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(
            f"{place}: the key has characters that not every client can send in a header; use "
            "ASCII letters, digits and punctuation."
        )


def _experts(names: Sequence[str], place: str) -> Experts:
    """Return the experts that a line names after its key.

    Args:
        names: the words after the key.
        place: where the line stands, for messages.

    Raises:
        ConfigError: a word is no name of an expert.
    """
    if not names:
        return None
    if list(names) == [NO_EXPERT]:
        return frozenset()
    for name in names:
        try:
            valid_name(name)
        except ValueError:
            raise ConfigError(
                f"{place}: {shown(name)} is no name of an expert; write names separated by spaces, "
                f"{NO_EXPERT} alone for no expert, or the key alone for all."
            ) from None
    return frozenset(names)
