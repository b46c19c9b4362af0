"""The runner of stock `transformers` models with attached experts.

Sequences that decode share one forward pass; prompts are computed one after another.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from deepseek.engine.attached_batch import (
    can_join,
    join_layers,
    padding_mask,
    similar_lengths,
    split_layer,
)
from deepseek.engine.reference import ReferenceRunner
from deepseek.errors import ConfigError, shown
from deepseek.model.attached.hooks import AttachedContext
from deepseek.model.attached.memory import ExpertMemory, remembering
from deepseek.model.attached.model import AttachedModel
from deepseek.model.attached.traits import supported
from deepseek.model.experts.armed import ArmedExperts
from deepseek.model.experts.ragged import RaggedExperts, speakers_of
from deepseek.runner import Chunk, RunnerOutput, Segment


@dataclass(frozen=True)
class AttachedSegment:
    """The state of a range of tokens in a stock cache.

    Attributes:
        layers: for each layer of the cache its keys and values `[1, G, T, K]` of the range, or, for
            a layer that keeps no entry per token (a sliding window, a recurrent state), a copy of
            the layer after the last token.
        memory: state of the armed experts after the last token, without these themselves.
        length: position after the last token.
        nbytes: memory in bytes.
    """

    layers: tuple[Any, ...]
    memory: ExpertMemory
    length: int
    nbytes: int

    @property
    def stream_bytes(self) -> int:
        return 0  # the only part of the layers is the uppermost one


class AttachedState:
    """The stock cache of one sequence, of the classes that `generate` would choose.

    While the sequence decodes beside others, its keys and values lie in a batch.

    Args:
        model: the model.
        armed: the sequence's experts; None for the base alone.
    """

    def __init__(self, model: AttachedModel, armed: ArmedExperts | None) -> None:
        self.cache: Cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        self.memory = remembering(self.cache)
        self.memory.start(armed)
        self.length = 0
        self.batch: DecodingBatch | None = None

    @property
    def nbytes(self) -> int:
        self.leave_batch()
        tensors = sum(tensor_bytes(layer) for layer in self.cache.layers)
        return tensors + self.memory.nbytes

    def leave_batch(self) -> None:
        """Take this and the other sequences out of their batch, if they are in one."""
        if self.batch is not None:
            self.batch.dissolve()

    def segment(self, start: int) -> AttachedSegment:
        """Return a copy of the state of the tokens from `start` to the last one."""
        self.leave_batch()
        layers = tuple(_segment(layer, start) for layer in self.cache.layers)
        nbytes = sum(tensor_bytes(layer) for layer in layers) + self.memory.nbytes
        # Without the experts, which leave memory before their gates' sums leave the prefix cache.
        memory = copy.deepcopy(replace(self.memory, armed=None))
        return AttachedSegment(layers, memory, self.length, nbytes)

    def extend(self, segment: Segment) -> None:
        assert isinstance(segment, AttachedSegment)
        self.leave_batch()
        for index, part in enumerate(segment.layers):
            if isinstance(part, tuple):
                self.cache.update(*part, index)
            else:
                self.cache.layers[index] = copy.deepcopy(part)  # others may extend by it as well
        self.memory.gate_state = dict(segment.memory.gate_state)
        self.memory.relevance_state = segment.memory.relevance_state
        self.length = segment.length

    def close(self) -> None:
        # Without leaving the batch first, whose rows would be copied: the device may be full.
        self.batch = None
        self.cache.layers.clear()


class DecodingBatch:
    """Sequences that decode together, with one cache that is padded on the left.

    It lasts as long as the same sequences decode.

    Args:
        states: the states of the sequences, whose caches move into the batch.
    """

    def __init__(self, states: Sequence[AttachedState]) -> None:
        for state in states:
            state.leave_batch()
        self.states = tuple(states)
        longest = max(state.length for state in states)
        layers = zip(*(state.cache.layers for state in states), strict=True)
        self.cache = copy.copy(states[0].cache)
        self.cache.layers = [join_layers(parts, longest) for parts in layers]
        for state in states:
            state.batch = self
            state.cache.layers = []

    def dissolve(self) -> None:
        """Move keys and values back into the caches of the sequences that have not been closed."""
        for row, state in enumerate(self.states):
            if state.batch is not self:
                continue
            state.cache.layers = [
                split_layer(layer, row, state.length) for layer in self.cache.layers
            ]
            state.batch = None


class AttachedRunner(ReferenceRunner):
    """Runs a stock model with attached experts on its own device.

    Args:
        model: the model to run.

    Raises:
        ConfigError: the model does not go on from a stock cache as from the text itself.
    """

    def __init__(self, model: AttachedModel) -> None:
        self.model = model
        self._layers = _measure(model)
        self._joins = can_join(AttachedState(model, None).cache)

    def cache_bytes(self, length: int) -> int:
        return sum(layer.at(length) for layer in self._layers)

    def divides(self, armed: ArmedExperts | None) -> bool:
        """Return False: the layers of a stock cache cannot be computed apart."""
        return False

    def empty_state(
        self, armed: ArmedExperts | None, capacity: int, cuts: tuple[int, ...]
    ) -> AttachedState:
        assert not cuts
        return AttachedState(self.model, armed)

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk]) -> RunnerOutput:
        rows: dict[int, tuple[Tensor, list[str | None]]] = {}
        decoding = [chunk for chunk in chunks if self._decodes(chunk)]
        for group in similar_lengths(decoding):
            if len(group) == 1:
                continue
            logits_BV, speakers = self._decode(group)
            for chunk, logits_V, speaker in zip(group, logits_BV, speakers, strict=True):
                rows[id(chunk)] = (logits_V[None], [speaker])
        parts = [rows.get(id(chunk)) or self._alone(chunk) for chunk in chunks]
        experts = [name for _, names in parts for name in names]
        logits_RV = torch.cat([logits for logits, _ in parts])
        return RunnerOutput(logits_RV, tuple(experts), tuple(map(_segments, chunks)))

    def _decodes(self, chunk: Chunk) -> bool:
        """Return whether a chunk is the next token of a sequence that can join a batch."""
        assert isinstance(chunk.state, AttachedState)
        return self._joins and len(chunk.ids) == chunk.keep == 1 and chunk.state.length > 0

    def _alone(self, chunk: Chunk) -> tuple[Tensor, list[str | None]]:
        """Compute the chunk of one sequence; return logits and experts of its kept tokens."""
        state = chunk.state
        assert isinstance(state, AttachedState)
        state.leave_batch()
        # `logits_to_keep=0` would mean all logits, so a chunk within a prompt computes one row.
        output: Any = self.model(
            input_ids=torch.tensor([chunk.ids], device=self.model.device),
            cache=state.cache,
            use_cache=True,
            logits_to_keep=max(1, chunk.keep),
        )
        state.length += len(chunk.ids)
        logits_TV = output.logits[0, -max(1, chunk.keep) :][: chunk.keep]
        return logits_TV.float().cpu(), loudest(output.experts, chunk.keep)

    def _decode(self, chunks: Sequence[Chunk]) -> tuple[Tensor, list[str | None]]:
        """Compute the next token of several sequences; return its logits and experts."""
        states = [chunk.state for chunk in chunks if isinstance(chunk.state, AttachedState)]
        batch = states[0].batch
        if batch is None or batch.states != tuple(states):
            batch = DecodingBatch(states)
        lengths = [state.length for state in states]
        device = self.model.device
        ids_B1 = torch.tensor([[*chunk.ids] for chunk in chunks], device=device)
        positions_B1 = torch.tensor(lengths, device=device)[:, None]
        ragged = _ragged(states, ids_B1, positions_B1)
        with self.model.expert_hooks.running(ragged):
            arguments = supported(self.model, position_ids=positions_B1)
            output: Any = self.model(
                input_ids=ids_B1,
                attention_mask=padding_mask(lengths, device),
                cache=batch.cache,
                use_cache=True,
                **arguments,
            )
        for state in states:
            state.length += 1
        armed = None if ragged is None else ragged.armed
        return output.logits[:, -1].float().cpu(), speakers_of(armed, len(states))


def _ragged(
    states: Sequence[AttachedState], ids_B1: Tensor, positions_B1: Tensor
) -> AttachedContext | None:
    """Return the context of sequences with one new token each, laid end to end in one row; None if
    none has experts.
    """
    if all(state.memory.armed is None for state in states):
        return None
    sequences = [
        AttachedContext(
            position_ids_BT=positions_B1[row : row + 1],
            token_mask_BT=None,
            document_ids_BT=None,
            input_ids_BT=ids_B1[row : row + 1],
            cache=state.memory,
            armed=state.memory.armed,
        )
        for row, state in enumerate(states)
    ]
    return AttachedContext(
        position_ids_BT=positions_B1.mT,
        token_mask_BT=None,
        document_ids_BT=None,
        input_ids_BT=ids_B1.mT,
        cache=None,
        armed=RaggedExperts(sequences),
    )


def loudest(armed: ArmedExperts | None, count: int) -> list[str | None]:
    """Return, for each of the last `count` positions of a pass over one sequence, the expert with
    the largest weight; where no expert fired an adapter, or None if none is armed.
    """
    if armed is None or count == 0:
        return [None] * count
    adapter: str | None = armed.strongest_adapter
    names = armed.names
    if not names:
        return [adapter] * count
    weights_TM: Tensor = armed.attribution()[0, -count:]
    return [names[int(row.argmax())] if bool((row > 0).any()) else adapter for row in weights_TM]


@dataclass(frozen=True)
class _LayerBytes:
    """Memory of one layer of a cache: a constant, and bytes per token up to a window."""

    constant: int
    per_token: int
    window: int | None

    def at(self, length: int) -> int:
        """Return the bytes after `length` tokens."""
        tokens = length if self.window is None else min(length, self.window)
        return self.constant + self.per_token * tokens


def _measure(model: AttachedModel) -> list[_LayerBytes]:
    """Return the memory of a model's cache, measured after 8 and after 16 tokens.

    Raises:
        ConfigError: the model does not go on from a stock cache as from the text itself.
    """
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()  # dropout would make any two passes differ
        with torch.autocast(model.device.type, enabled=False):  # the engine's thread has none
            layers, error = _probe(model)
    except torch.OutOfMemoryError:
        raise
    except Exception as cause:  # a family's code may raise anything
        raise _unfit(model, f"it raises {shown(cause)}") from cause
    finally:
        for module in training:
            module.training = True
    if error > _largest_error(model):
        raise _unfit(model, f"logits differ by {error:.0%} from those of one pass")
    return layers


def _unfit(model: AttachedModel, reason: str) -> ConfigError:
    return ConfigError(
        f"A {type(model).__name__} cannot continue a text from a cache by several tokens "
        f"({reason}), as an engine does; use model.generate."
    )


@torch.inference_mode()
def _probe(model: AttachedModel) -> tuple[list[_LayerBytes], float]:
    """Return the memory of a model's cache, and how far the logits of 8 tokens after 8 others are
    from those of one pass: the norm of the difference as a share of the norm.
    """
    ids = torch.arange(16, device=model.device)[None]
    state = AttachedState(model, None)
    sizes = []

    def logits(ids: Tensor, state: AttachedState) -> Tensor:
        output: Any = model(input_ids=ids, cache=state.cache, use_cache=True, logits_to_keep=8)
        logits_TV = output.logits[0, -8:].float()
        # What is added to all logits of a token changes no probability, and would hide differences.
        centred: Tensor = logits_TV - logits_TV.mean(-1, keepdim=True)
        return centred

    def step(ids: Tensor) -> Tensor:
        after = logits(ids, state)
        sizes.append([tensor_bytes(layer) for layer in state.cache.layers])
        return after

    step(ids[:, :8])
    # Between the two, as some models keep a part of the state in their own modules.
    whole = logits(ids, AttachedState(model, None))
    parts = step(ids[:, 8:])
    layers = []
    for layer, first, second in zip(state.cache.layers, *sizes, strict=True):
        per_token = -(-(second - first) // 8)
        window = getattr(layer, "sliding_window", None)
        layers.append(_LayerBytes(max(0, second - 16 * per_token), per_token, window))
    # The median, because rounding may send single tokens to another expert of a mixture.
    return layers, float(((parts - whole).norm(dim=-1) / whole.norm(dim=-1)).median())


def _largest_error(model: AttachedModel) -> float:
    """Return the largest error of `_probe` that may be rounding.

    Of tiny random models of 120 families, right ones have errors up to 1e-6 in fp32, 3e-3 in fp16
    (as TF32 rounds) and 3e-2 in bf16; ones that lose state have errors of 2e-2 to 0.9 in every
    dtype, and larger ones once trained, as their state then matters more. Rounding grows with depth
    and where weights or activations are quantised, so the bound there leaves much room.
    """
    exact = all(parameter.dtype.itemsize >= 4 for parameter in model.parameters())
    quantised = getattr(model, "hf_quantizer", None) is not None or any(
        "quant" in type(module).__module__ for module in model.modules()
    )
    return 0.01 if exact and not quantised else 0.2


def _segments(chunk: Chunk) -> dict[int, AttachedSegment]:
    """Return the segment of a chunk, if it is to be stored, by the index of the only part."""
    state = chunk.state
    assert isinstance(state, AttachedState)
    return {0: state.segment(state.length - len(chunk.ids))} if chunk.store else {}


def _segment(layer: Any, start: int) -> Any:
    if type(layer) is DynamicLayer and layer.keys is not None and layer.values is not None:
        return layer.keys[:, :, start:].clone(), layer.values[:, :, start:].clone()
    return copy.deepcopy(layer)


def tensor_bytes(value: Any) -> int:
    """Return the bytes of the tensors in a tuple, list or dict, or in an object's attributes."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(tensor_bytes(part) for part in value.values())
    if isinstance(value, tuple | list):
        return sum(tensor_bytes(part) for part in value)
    return tensor_bytes(vars(value)) if hasattr(value, "__dict__") else 0
