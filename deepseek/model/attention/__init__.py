"""How tokens look at each other. One protocol, one table; a new kind is one file and one row."""

from deepseek.model.attention.full import FullAttention
from deepseek.model.attention.lsh import LshAttention

# Each is a module of (config, layer_idx) that maps (x [B, T, D], ForwardContext) to [B, T, D].
ATTENTION: dict[str, type[FullAttention]] = {"full": FullAttention, "lsh": LshAttention}
