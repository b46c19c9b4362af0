"""Settings of a server."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from secrets import token_urlsafe
from typing import Any, get_args

from deepseek import checks
from deepseek.checkpoint.files import expanded
from deepseek.checkpoint.store import home
from deepseek.checks import Check
from deepseek.errors import ConfigError
from deepseek.packs.library import experts_folder
from deepseek.server.keys import checked_keys
from deepseek.server.request_log import LogLevel


@dataclass(frozen=True)
class Settings:
    """Settings of a server.

    Attributes:
        model: the base model's name in the API, without a path.
        base: name, folder or hub id of the base, passed to trainings.
        device: device of the model, passed to trainings.
        host: address to listen on.
        port: port to listen on; 0 takes a free one.
        hosts: further accepted values of the `Host` header, beside loopback and `host`; "*": all.
        origins: pages of other sites that may send requests, such as `https://chat.example`;
            "*" allows every page.
        aliases: further names of the base model, for clients that insist on one.
        api_keys: keys that may send requests; empty: everyone who can reach the server, or if
            there are `admin_keys`, those who have one.
        key_experts: those of the `api_keys` that may use only some experts, each with their names;
            the others may use all.
        admin_keys: keys that may change the server, and send requests; empty: no one may change it
            if `api_keys` are set, else everyone.
        experts_folder: folder from which packs are plugged by name.
        teach_root: folder below which training text must lie; None turns teaching off.
        preferences: file of the preference database.
        max_body, max_upload: most bytes of a request body, and of an uploaded pack.
        request_seconds: time limit of a request, in seconds.
        answer_tokens: most tokens of an answer if the request sets no limit.
        infill_passages: most passages of the experts' indexes to put before the text of an
            editor's request (`/infill`) that does not say so itself; 0: none.
        log_level: least severe messages to log, on standard error; "info" logs each request. None
            leaves logging as the program has set it up.
        secret: secret from which session cookies are derived; replicas of one server share it.

    Raises:
        ConfigError: a field has a wrong type or is out of range, a set of texts holds an empty one,
            a key cannot be sent in a header, or a key in `key_experts` is not among the
            `api_keys`, or is an admin key too.
    """

    model: str = "smollm2-135m"
    base: str = "smollm2-135m"
    device: str = "auto"
    host: str = "127.0.0.1"
    port: int = 8000
    hosts: frozenset[str] = frozenset()
    origins: frozenset[str] = frozenset()
    aliases: frozenset[str] = frozenset()
    api_keys: frozenset[str] = frozenset()
    key_experts: Mapping[str, frozenset[str]] = field(default_factory=dict)
    admin_keys: frozenset[str] = frozenset()
    experts_folder: Path = field(default_factory=experts_folder)
    teach_root: Path | None = None
    preferences: Path = field(default_factory=lambda: home() / "preferences.db")
    max_body: int = 4 << 20
    max_upload: int = 1 << 30
    request_seconds: float = 600.0
    answer_tokens: int = 512
    infill_passages: int = 0
    log_level: LogLevel | None = None
    secret: str = field(default_factory=token_urlsafe, repr=False)

    def __post_init__(self) -> None:
        checks.apply(SETTINGS, self)
        if self.key_experts and not self.key_experts.keys() <= self.api_keys - self.admin_keys:
            raise ConfigError(
                "A key with a list of experts is not among the user keys, or an admin key too; "
                "give each key once, for users or for administrators."
            )


def _texts(name: str, value: Any) -> frozenset[str]:
    """Return a set of texts, none of them empty."""
    texts = checks.texts(name, value)
    if not all(texts):
        raise ConfigError(f"{name} holds an empty text; leave it out.")
    return frozenset(texts)


def _key_experts(name: str, value: Any) -> dict[str, frozenset[str]]:
    """Return the names of experts by key; no message shows a key."""
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"{name} is a {type(value).__name__}, not a mapping of keys to names of experts."
        )
    return {key: _texts(f"{name}[...]", names) for key, names in value.items()}


def _path(name: str, value: Any) -> Path:
    """Return a path, with `~` replaced."""
    return expanded(checks.path(name, value))


def _secret(name: str, value: Any) -> str:
    """Return a secret; no message shows it."""
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{name} must be a text that is not empty; leave it out to draw one.")
    return value


SETTINGS: dict[str, Check] = {
    "model": checks.text,
    "base": checks.text,
    "device": checks.text,
    "host": checks.text,
    "port": partial(checks.whole, least=0, most=65535),
    "hosts": _texts,
    "origins": _texts,
    "aliases": _texts,
    "api_keys": checked_keys,
    "key_experts": _key_experts,
    "admin_keys": checked_keys,
    "experts_folder": _path,
    "teach_root": checks.optional(_path),
    "preferences": _path,
    "max_body": checks.positive,
    "max_upload": checks.positive,
    "request_seconds": partial(checks.number, above=0),
    "answer_tokens": checks.positive,
    "infill_passages": partial(checks.whole, least=0),
    "log_level": checks.optional(partial(checks.choice, valid=get_args(LogLevel))),
    "secret": _secret,
}
"""Type and range of each field of `Settings`."""
