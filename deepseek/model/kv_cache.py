"""Keys and values of past tokens, and what plugged experts remember of them."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import DynamicCache

from deepseek.errors import ConfigError
from deepseek.kernels.lsh.decode import BucketCache


class KVCache(DynamicCache):
    """A Hugging Face `DynamicCache` that also holds the gates' running sums and the buckets of LSH attention.

    `gate_state[layer]` is `[B, 3, M]`: the sums of both gate scores of M modules and their common denominator (see
    `model/experts/gate.py`). `armed` is the set of experts that the sequence started with, so that plugging or
    unplugging between two steps never changes a sequence in flight. `relevance_state` is `[B, M+1]`, the evidence so
    far that the text is about each expert's domain (see `model/experts/relevance.py`). `buckets[layer]` says which keys
    of an LSH layer fall into which bucket. `key_bias[layer]` `[B, H, S]` is what dynamic positions add to the scores of
    each key.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gate_state: dict[int, Tensor] = {}
        self.relevance_state: Tensor | None = None
        self.buckets: dict[int, BucketCache] = {}
        self.key_bias: dict[int, Tensor] = {}
        self.armed: Any = None
        self.started = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._change_rows(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._change_rows(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._change_rows(lambda state: state[indices])

    def crop(self, tokens_to_remove: int) -> None:
        if self.gate_state:
            raise ConfigError(
                "A cache with armed experts cannot be shortened, because their gates keep running sums; "
                "disarm the experts for assisted decoding."
            )
        super().crop(tokens_to_remove)
        for buckets in self.buckets.values():
            buckets.crop(self.get_seq_length())
        self.key_bias = {layer: state[..., : self.get_seq_length()] for layer, state in self.key_bias.items()}

    def _change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        self.gate_state = {layer: change(state) for layer, state in self.gate_state.items()}
        self.key_bias = {layer: change(state) for layer, state in self.key_bias.items()}
        if self.relevance_state is not None:
            self.relevance_state = change(self.relevance_state)
        if self.armed is not None:
            self.armed = self.armed.with_rows(change)
        for buckets in self.buckets.values():
            buckets.change_rows(change)
