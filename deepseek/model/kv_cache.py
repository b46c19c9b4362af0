"""Keys and values of past tokens, and what plugged experts remember of them."""

from typing import Any

from torch import Tensor
from transformers import DynamicCache

from deepseek.errors import ConfigError


class KVCache(DynamicCache):
    """A Hugging Face `DynamicCache` that also holds the gates' running sums.

    `gate_state[layer]` is `[B, 3, M]`: the sums of both gate scores of M modules and their common denominator (see
    `model/experts/gate.py`). `armed` is the set of experts that the sequence started with, so that plugging or
    unplugging between two steps never changes a sequence in flight.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gate_state: dict[int, Tensor] = {}
        self.armed: Any = None
        self.started = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._map_gates(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map_gates(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._map_gates(lambda state: state[indices])

    def crop(self, tokens_to_remove: int) -> None:
        if self.gate_state:
            raise ConfigError(
                "A cache with armed experts cannot be shortened, because their gates keep running sums; "
                "disarm the experts for assisted decoding."
            )
        super().crop(tokens_to_remove)

    def _map_gates(self, change: Any) -> None:
        self.gate_state = {layer: change(state) for layer, state in self.gate_state.items()}
