"""The KV cache: keys and values of past tokens, and the state of layers and plugged experts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from deepseek.errors import ConfigError
from deepseek.model.layer_parts import LayerPart
from deepseek.model.relevance_state import RelevanceState

Change = Callable[[Tensor], Tensor]
"""Selects, repeats or reorders the sequences of a batch along the first axis of a tensor."""


class LayerState(Protocol):
    """State of one layer beside keys and values, such as running sums over past tokens.

    Each kind of attention or positional encoding that needs state defines a class. A segment, the
    state of a range of tokens, has the same class, so that other code never looks inside.
    """

    @property
    def nbytes(self) -> int:
        """Memory in use, in bytes."""

    def segment(self, start: int) -> Self:
        """Return a copy of the state of the tokens from `start` to the end; no memory is shared."""

    def extend(self, segment: Self) -> None:
        """Append the tokens of `segment`, whose `start` must equal this state's length."""

    def crop(self, length: int) -> None:
        """Drop the tokens from position `length` on."""

    def change_rows(self, change: Change) -> None:
        """Apply `change` to every tensor that has one row per sequence."""


State = TypeVar("State", bound=LayerState)
Key = tuple[int, type[LayerState]]
"""Layer index and class of the state."""


@dataclass(frozen=True)
class CacheSegment:
    """The cache entries of a range of tokens at one part of the layers. Segments are immutable.

    Attributes:
        start, stop: positions of the first token, and past the last one.
        layers: the layers of the part.
        keys, values: `[B, G, T, K]` per layer.
        gates: layer -> running sums of the gates `[B, 3, M]` after the last token.
        states: state of layers beside keys and values.
        stream_BTD: residual stream at the part's cut; None: the uppermost part.
    """

    start: int
    stop: int
    layers: range
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    gates: dict[int, Tensor]
    states: dict[Key, LayerState]
    stream_BTD: Tensor | None

    @property
    def stream_bytes(self) -> int:
        """Memory of the residual stream, in bytes."""
        return 0 if self.stream_BTD is None else self.stream_BTD.nbytes

    @property
    def nbytes(self) -> int:
        """Memory in use, in bytes."""
        tensors = sum(part.nbytes for part in (*self.keys, *self.values, *self.gates.values()))
        states = sum(state.nbytes for state in self.states.values())
        return tensors + states + self.stream_bytes


class ReservedLayer(DynamicLayer):
    """Keys and values of one layer, in memory for `capacity` tokens, so that a step appends to them
    without copying the past.

    Beyond its capacity, or after its rows have changed, it grows by copies like its base class.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self._memory: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        key, value = (
            part.new_empty(*part.shape[:-2], self.capacity, part.shape[-1])
            for part in (key_states, value_states)
        )
        self._memory = (key, value)
        self.keys = key[..., :0, :]
        self.values = value[..., :0, :]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        memory = self.memory(key_states.shape[-2])
        if memory is None or len(key_states) != len(memory[0]):
            grown: tuple[Tensor, Tensor] = super().update(key_states, value_states)
            return grown
        start = self.get_seq_length()
        for part, states in zip(memory, (key_states, value_states), strict=True):
            part[..., start : start + states.shape[-2], :] = states
        return self.written(key_states.shape[-2])

    def reset(self) -> None:
        super().reset()
        self._memory = None

    def memory(self, count: int) -> tuple[Tensor, Tensor] | None:
        """Return the memory `[B, G, capacity, K]` of keys and of values, if it holds the cached
        ones and has space for `count` more; else None.
        """
        if self._memory is None or self.keys is None:
            return None
        # The address of a tensor without elements is 0, so compare storages.
        if self.keys.untyped_storage().data_ptr() != self._memory[0].untyped_storage().data_ptr():
            return None
        return self._memory if self.get_seq_length() + count <= self.capacity else None

    def written(self, count: int) -> tuple[Tensor, Tensor]:
        """Count `count` tokens that were written to `memory` as cached; return keys and values of
        all tokens.
        """
        assert self._memory is not None
        stop = self.get_seq_length() + count
        key, value = (part[..., :stop, :] for part in self._memory)
        self.keys = key
        self.values = value
        return key, value


class KVCache(DynamicCache):
    """A Hugging Face `DynamicCache` that also holds the state of layers and plugged experts.

    Attributes:
        states: state of layers beside keys and values (see `layer_state`).
        gate_state: layer -> `[B, 3, M]`: the running sums of both gate scores of M modules, and
            their common denominator (see `model/experts/gate.py`).
        relevance_state: the accumulated evidence that the text is about each expert's domain.
        armed: the experts that the sequence started with. They are pinned here so that plugging or
            unplugging between two steps never changes a sequence in flight.
        started: whether `armed` has been set.
        packed: whether a row holds several documents.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._clear_state()

    def reset(self) -> None:
        """Forget all tokens, so that the cache can be reused for another sequence.

        Memory that `reserve` asked for is allocated again at the next token.
        """
        super().reset()
        self._clear_state()

    def _clear_state(self) -> None:
        """Set everything beside keys and values to its value in an empty cache."""
        self.states: dict[Key, LayerState] = {}
        self.gate_state: dict[int, Tensor] = {}
        self.relevance_state: RelevanceState | None = None
        self.armed: Any = None
        self.started = False
        self.packed = False

    def reserve(self, layers: int, capacity: int) -> None:
        """Make an empty cache keep memory for `capacity` tokens from its first token on.

        Args:
            layers: number of layers.
            capacity: number of tokens.
        """
        self.layers = [ReservedLayer(capacity) for _ in range(layers)]

    @property
    def nbytes(self) -> int:
        """Memory in use by keys, values, gate sums and layer states, in bytes."""
        layers: Any = self.layers
        parts = [
            part for layer in layers if layer.is_initialized for part in (layer.keys, layer.values)
        ]
        tensors = sum(part.nbytes for part in (*parts, *self.gate_state.values()))
        return tensors + sum(state.nbytes for state in self.states.values())

    def segment(
        self, tokens: range, part: LayerPart, stream_BTD: Tensor | None = None
    ) -> CacheSegment:
        """Return a copy of the cache entries of the last tokens of a part of the layers.

        Args:
            tokens: positions of the tokens.
            part: the layers to copy.
            stream_BTD: residual stream of these tokens at the part's cut; None: the uppermost part.
        """
        layers: list[Any] = [self.layers[layer] for layer in part.cached]
        gates = {layer: sums for layer, sums in self.gate_state.items() if layer in part.gated}
        states = {key: state for key, state in self.states.items() if key[0] in part.cached}
        return CacheSegment(
            start=tokens.start,
            stop=tokens.stop,
            layers=part.cached,
            keys=tuple(layer.keys[:, :, tokens.start :].clone() for layer in layers),
            values=tuple(layer.values[:, :, tokens.start :].clone() for layer in layers),
            gates={layer: sums.clone() for layer, sums in gates.items()},
            states={key: state.segment(tokens.start) for key, state in states.items()},
            stream_BTD=None if stream_BTD is None else stream_BTD.clone(),
        )

    def extend(self, segment: CacheSegment) -> None:
        """Append the tokens of `segment` to its layers.

        Its `start` must equal their length in this cache, and it must come from a sequence in which
        the same experts acted below the end of its layers.
        """
        parts = zip(segment.layers, segment.keys, segment.values, strict=True)
        for layer, keys, values in parts:
            self.update(keys, values, layer)
        for key, state in segment.states.items():
            if key in self.states:
                self.states[key].extend(state)
            else:
                # Copy: the same segment may be appended to other caches.
                self.states[key] = state.segment(0)
        # No copy of the tensors: a step replaces the sums and never writes to them in place.
        self.gate_state = self.gate_state | segment.gates

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._change_rows(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._change_rows(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._change_rows(lambda state: state[indices])

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can restore an earlier state; running sums of gates cannot be undone."""
        return super().is_croppable and not self.gate_state

    def crop(self, tokens_to_remove: int) -> None:
        if self.gate_state:
            raise ConfigError(
                "A cache with armed experts cannot be cropped, because their gates keep running "
                "sums; disarm the experts for assisted decoding."
            )
        super().crop(tokens_to_remove)
        for state in self.states.values():
            state.crop(self.get_seq_length())

    def _change_rows(self, change: Change) -> None:
        self.gate_state = {layer: change(sums) for layer, sums in self.gate_state.items()}
        if self.relevance_state is not None:
            self.relevance_state = self.relevance_state.with_rows(change)
        if self.armed is not None:
            self.armed = self.armed.with_rows(change)
        for state in self.states.values():
            state.change_rows(change)


def layer_state(
    cache: KVCache | None, layer_idx: int, kind: type[State], make: Callable[[], State], user: str
) -> State:
    """Return the state of a layer in `cache`, creating it at the first call.

    Args:
        cache: the cache of the pass; None: return a new state that lasts for this pass only.
        layer_idx: index of the layer.
        kind: class of the state; a layer has at most one state per class.
        make: returns an empty state.
        user: beginning of the error message, such as "Dynamic positions need".

    Raises:
        ConfigError: the cache is not a `KVCache` and so cannot hold layer state.
    """
    if cache is None:
        return make()
    if not isinstance(cache, KVCache):
        raise ConfigError(f"{user} deepseek.model.KVCache as cache; leave `cache` out.")
    key = (layer_idx, kind)
    if key not in cache.states:
        cache.states[key] = make()
    state = cache.states[key]
    assert isinstance(state, kind)
    return state


@dataclass
class TokenState:
    """A `LayerState` of one tensor with one entry per past token on its last axis.

    Attributes:
        values: `[B, ..., S]`; None: no tokens yet.
    """

    values: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return 0 if self.values is None else self.values.nbytes

    def segment(self, start: int) -> Self:
        return type(self)(None if self.values is None else self.values[..., start:].clone())

    def extend(self, segment: Self) -> None:
        if segment.values is not None:
            self.append(segment.values)

    def append(self, values: Tensor) -> Tensor:
        """Append the entries `[B, ..., T]` of new tokens and return those of all tokens."""
        self.values = values if self.values is None else torch.cat((self.values, values), dim=-1)
        return self.values

    def crop(self, length: int) -> None:
        if self.values is not None:
            self.values = self.values[..., :length] if length else None

    def change_rows(self, change: Change) -> None:
        if self.values is not None:
            self.values = change(self.values)
