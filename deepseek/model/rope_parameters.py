"""Checks of `rope_parameters`: the keys and ranges of each type of rotary embedding."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from deepseek.checks import Check, choice, flag, mapping, number, optional, whole
from deepseek.errors import ConfigError
from deepseek.registry import nearest

KEYS: dict[str, Check] = {
    "rope_theta": partial(number, above=1),
    "partial_rotary_factor": partial(number, above=0, most=1),
    "factor": partial(number, least=1),
    "low_freq_factor": partial(number, above=0),
    "high_freq_factor": partial(number, above=0),
    "original_max_position_embeddings": partial(whole, least=1),
    "attention_factor": optional(partial(number, above=0)),
    "beta_fast": optional(partial(number, above=0)),
    "beta_slow": optional(partial(number, above=0)),
    "mscale": optional(partial(number, least=0)),
    "mscale_all_dim": optional(partial(number, least=0)),
    "truncate": flag,
}
"""Keys of all types, with the check of each value."""

SHARED = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")

YARN = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")

REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
"""Keys that a type needs; their formulas are those of `transformers`."""

ALLOWED = {kind: (*keys, *SHARED) for kind, keys in REQUIRED.items()} | {
    "yarn": (*REQUIRED["yarn"], *SHARED, *YARN)
}


ROTARY = ("dpe", "rope")
"""Positional encodings that rotate queries and keys."""


def check_rope(given: Mapping[str, Any], encoding: str) -> dict[str, Any]:
    """Check the parameters of a rotary embedding, and return them in their plain types.

    Args:
        given: `ModelConfig.rope_parameters` after Hugging Face has filled in its defaults.
        encoding: `ModelConfig.positional_encoding`.

    Raises:
        ConfigError: the type or a key is unknown, a key is missing, a value is out of range, or the
            encoding does not rotate.
    """
    plain = mapping("rope_parameters", given)
    parameters = dict(plain)
    parameters.pop("type", None)  # older name of `rope_type`, which has been filled in from it
    kind = choice(_key("rope_type"), parameters.pop("rope_type", "default"), REQUIRED)
    if encoding not in ROTARY and kind != "default":
        raise ConfigError(
            f"rope_parameters of type {kind!r} contradict positional_encoding={encoding!r}, which "
            "rotates nothing; leave them out or use 'rope' or 'dpe'."
        )
    for key in REQUIRED[kind]:
        if parameters.get(key) is None:
            raise ConfigError(f"{_key(key)} is missing; rope_type {kind!r} needs it.")
    for key, value in parameters.items():
        if key not in ALLOWED[kind]:
            raise ConfigError(
                f"rope_parameters of type {kind!r} have no key {key!r}; "
                f"{nearest(key, ALLOWED[kind])}."
            )
        plain[key] = KEYS[key](_key(key), value)
    if parameters.get("partial_rotary_factor", 1) != 1:
        raise ConfigError(
            f"{_key('partial_rotary_factor')}={parameters['partial_rotary_factor']} is not "
            "supported: heads are rotated whole; leave it out."
        )
    _check_order(parameters, "low_freq_factor", "high_freq_factor")
    _check_order(parameters, "beta_slow", "beta_fast")
    return plain


DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0}


def _check_order(parameters: Mapping[str, Any], low: str, high: str) -> None:
    """Raise `ConfigError` unless the value of `low` is below that of `high`."""
    small = parameters.get(low) or DEFAULTS.get(low)
    large = parameters.get(high) or DEFAULTS.get(high)
    if small is not None and large is not None and small >= large:
        raise ConfigError(f"{_key(low)}={small} must be below {_key(high)}={large}.")


def _key(name: str) -> str:
    return f"rope_parameters[{name!r}]"
