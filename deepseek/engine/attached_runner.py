"""The runner of stock `transformers` models with attached experts.

Sequences that decode share one forward pass; prompts are computed one after another.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from deepseek.engine.attached_batch import (
    can_join,
    join_layers,
    padding_mask,
    similar_lengths,
    split_layer,
)
from deepseek.engine.attached_probe import measure, new_cache, tensor_bytes
from deepseek.engine.reference import ReferenceRunner
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

    While the sequence decodes beside others, its keys and values are in a `DecodingBatch`.

    Args:
        model: the model.
        armed: the sequence's experts; None for the base alone.
    """

    def __init__(self, model: AttachedModel, armed: ArmedExperts | None) -> None:
        self.cache: Cache = new_cache(model)
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
        # Without the experts, so that the prefix cache does not keep them in memory.
        memory = copy.deepcopy(replace(self.memory, armed=None))
        return AttachedSegment(layers, memory, self.length, nbytes)

    def extend(self, segment: Segment) -> None:
        assert isinstance(segment, AttachedSegment)
        self.leave_batch()
        for index, part in enumerate(segment.layers):
            if isinstance(part, tuple):
                self.cache.update(*part, index)
            else:
                self.cache.layers[index] = copy.deepcopy(part)  # other states may extend by it too
        self.memory.gate_state = dict(segment.memory.gate_state)
        self.memory.relevance_state = segment.memory.relevance_state
        self.length = segment.length

    def close(self) -> None:
        # Not by `leave_batch`, which would copy the rows: the device may be full.
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
        ConfigError: the model does not continue from a stock cache as it does from the text.
    """

    def __init__(self, model: AttachedModel) -> None:
        self.model = model
        self._layers = measure(model)
        self._joins = can_join(AttachedState(model, None).cache)

    def cache_bytes(self, length: int) -> int:
        return sum(layer.at(length) for layer in self._layers)

    def divides(self, armed: ArmedExperts | None) -> bool:
        """Return False: the layers of a stock cache cannot be divided into parts."""
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
    the largest weight; where no expert fired, the strongest adapter, or None if none is armed.
    """
    if armed is None or count == 0:
        return [None] * count
    adapter: str | None = armed.strongest_adapter
    names = armed.names
    if not names:
        return [adapter] * count
    weights_TM: Tensor = armed.attribution()[0, -count:]
    return [names[int(row.argmax())] if bool((row > 0).any()) else adapter for row in weights_TM]


def _segments(chunk: Chunk) -> dict[int, AttachedSegment]:
    """Return the segment of a chunk, if it is to be stored, by the index of the only part."""
    state = chunk.state
    assert isinstance(state, AttachedState)
    return {0: state.segment(state.length - len(chunk.ids))} if chunk.store else {}


def _segment(layer: Any, start: int) -> Any:
    if type(layer) is DynamicLayer and layer.keys is not None and layer.values is not None:
        return layer.keys[:, :, start:].clone(), layer.values[:, :, start:].clone()
    return copy.deepcopy(layer)
