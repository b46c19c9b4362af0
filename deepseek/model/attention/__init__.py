"""The kinds of attention. To add one, write a class in its own file and add a row to the table.

An attention maps (x `[B, T, D]`, `ForwardContext`) to `[B, T, D]` and derives from `FullAttention`,
which documents what to override. State beside keys and values goes to a `LayerState`
(`model/kv_cache.py`), and config fields of one kind go to `model/attention_fields.py`.
"""

from deepseek.model.attention.full import FullAttention
from deepseek.model.attention.lsh import LshAttention

ATTENTION: dict[str, type[FullAttention]] = {"full": FullAttention, "lsh": LshAttention}
