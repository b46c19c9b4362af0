"""The model. Start with `transformer.py`.

Tensor names end in their shape: B batch, T query length, S key length, D width of the residual
stream, H query heads, G key/value heads, K head width, E routed experts, A active experts, N = B*T
tokens, F expert width, V vocabulary, M plugged expert modules.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepseek.model.kv_cache import KVCache as KVCache


def __getattr__(name: str) -> Any:
    """Import the cache, which callers of `generate` can pass, at first use (PEP 562)."""
    if name != "KVCache":
        raise AttributeError(f"module 'deepseek.model' has no attribute {name!r}")
    from deepseek.model.kv_cache import KVCache

    return KVCache
