"""How tokens look at each other. One table; a new kind is one class in a file of its own and one row.

A kind maps (x `[B, T, D]`, `ForwardContext`) to `[B, T, D]` and derives from `FullAttention`, which says what it may
override. What it keeps of past tokens beside keys and values is a state of its own (`model/kv_cache.py`), and fields of
the config that nobody else needs go to `model/attention_fields.py`.
"""

from deepseek.model.attention.full import FullAttention
from deepseek.model.attention.lsh import LshAttention

ATTENTION: dict[str, type[FullAttention]] = {"full": FullAttention, "lsh": LshAttention}
