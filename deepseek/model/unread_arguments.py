"""Refuse options of other models that this one would ignore.

Hugging Face's callers pass arguments to models of any family. Those that change nothing here are
accepted; all others would be ignored in silence, and the result would not be what was asked for.
"""

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

from torch import Tensor

from deepseek.errors import ConfigError, shown
from deepseek.registry import nearest

NEUTRAL: dict[str, Any] = {"is_causal": True}
"""Values that ask for what the model does anyway; of all other arguments, None and False."""

PASSED_ALONG = {"cache_position", "token_type_ids"}
"""Arguments that tokenizers and older callers pass: positions are counted, and all tokens are of
one type.
"""

DOCUMENT_BOUNDS = {"cu_seq_lens_k", "cu_seq_lens_q", "max_length_k", "max_length_q", "seq_idx"}
"""Arguments that describe the documents of packed rows, as `position_ids` do."""

UNSUPPORTED = {
    "is_causal": "attention is causal",
    "output_attentions": "attention weights are never computed as a matrix",
    "output_router_logits": "the output's router_stats describe the routing",
    **dict.fromkeys(DOCUMENT_BOUNDS, "documents are told apart by position_ids"),
}
"""Known arguments without support, and what there is instead."""


def refuse_unread(
    arguments: Mapping[str, Any], forward: Callable[..., Any], position_ids: Tensor | None
) -> None:
    """Raise `ConfigError` if a forward pass would ignore an argument that means something.

    Args:
        arguments: the arguments that `forward` does not name.
        forward: the method, for the names of its arguments.
        position_ids: positions that were passed.
    """
    for name, value in arguments.items():
        if value is None or value is NEUTRAL.get(name, False) or name in PASSED_ALONG:
            continue
        if name in DOCUMENT_BOUNDS and position_ids is not None:
            continue
        if name in UNSUPPORTED:
            raise ConfigError(
                f"{name}={shown(value)} is not supported: {UNSUPPORTED[name]}; leave {name} out."
            )
        names = signature(forward).parameters.keys() - {"self", "kwargs"}
        raise ConfigError(f"forward has no argument {name!r}; {nearest(name, names)}.")


def refuse_cache_kind(kind: str | None) -> None:
    """Raise `ConfigError` if `generate` is asked for another kind of cache than the model's own.

    Args:
        kind: `cache_implementation` of the generation config.
    """
    if kind not in (None, "dynamic"):
        raise ConfigError(
            f"cache_implementation={kind!r} is not supported: generate keeps keys and values in a "
            "deepseek.model.KVCache; leave it out."
        )


def refuse_attention_kind(kind: Any) -> None:
    """Raise `ConfigError` if `attn_implementation` asks for another attention than the model's."""
    if kind not in (None, "sdpa"):
        raise ConfigError(
            f"attn_implementation={shown(kind)} is not supported: the model has its own attention, "
            "which the config's field attention chooses; leave it out."
        )
