"""The reference runner: runs the PyTorch model on ragged batches. It supports every architecture
and every expert.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from deepseek.engine.reference import ReferenceRunner
from deepseek.model.experts.armed import ArmedExperts
from deepseek.model.experts.ragged import speakers_of
from deepseek.model.kv_cache import CacheSegment, KVCache
from deepseek.model.layer_parts import LayerPart, layer_parts
from deepseek.model.passes import ForwardPass
from deepseek.model.ragged import RaggedChunk, begin_ragged, resume_ragged
from deepseek.model.transformer import DeepSeekModel
from deepseek.runner import Chunk, RunnerOutput, Segment, in_groups


class TorchState:
    """The key/value cache of one sequence.

    Args:
        armed: the sequence's experts; None for the base alone.
        parts: the parts of the model's layers.
        capacity: maximum number of tokens, for which memory is kept.

    Attributes:
        cache: keys and values.
        length: number of tokens that all layers are computed for.
        parts: as passed.
        streams: position -> part and residual stream `[1, T, D]` of a chunk whose keys and values
            up to that part's cut came from the prefix cache.
    """

    def __init__(
        self, armed: ArmedExperts | None, parts: tuple[LayerPart, ...], capacity: int
    ) -> None:
        self.cache = KVCache()
        self.cache.reserve(parts[-1].cached.stop, capacity)
        self.cache.armed, self.cache.started = armed, True
        self.parts = parts
        self.length = 0
        self.streams: dict[int, tuple[int, Tensor]] = {}

    @property
    def nbytes(self) -> int:
        return self.cache.nbytes + sum(stream.nbytes for _, stream in self.streams.values())

    @property
    def entered(self) -> int:
        """Part at whose end the next chunk enters the model; -1: at layer 0."""
        return self.streams[self.length][0] if self.length in self.streams else -1

    def extend(self, segment: Segment) -> None:
        assert isinstance(segment, CacheSegment)
        self.cache.extend(segment)
        if segment.stream_BTD is None:
            self.streams.pop(segment.start, None)
            self.length = segment.stop
        else:
            index = [part.cached for part in self.parts].index(segment.layers)
            self.streams[segment.start] = (index, segment.stream_BTD)

    def close(self) -> None:
        self.cache = KVCache()
        self.streams = {}


class TorchRunner(ReferenceRunner):
    """Runs a `DeepSeekModel` on its own device, all chunks of a step in one pass.

    Every weight is read once a step, so 16 sequences cost little more than one. A chunk's logits
    beside others differ from those alone in the tests by at most 1e-4 in fp32 (5e-4 with dynamic
    positions), with the same experts attributed. Padding a lone row to a fixed block of rows would
    make the bits equal, but a lone sequence up to 2.5 times slower (docs/log/engine.md,
    2026-11-26).

    Args:
        model: the model to run.
    """

    def __init__(self, model: DeepSeekModel) -> None:
        self.model = model

    def cache_bytes(self, length: int) -> int:
        return self.model.state_bytes(length)

    def divides(self, armed: ArmedExperts | None) -> bool:
        return True

    def empty_state(
        self, armed: ArmedExperts | None, capacity: int, cuts: tuple[int, ...]
    ) -> TorchState:
        return TorchState(armed, layer_parts(len(self.model.layers), cuts), capacity)

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk]) -> RunnerOutput:
        groups: dict[int, list[int]] = {}
        for index, chunk in enumerate(chunks):
            groups.setdefault(_entry_layer(chunk), []).append(index)
        compute = [partial(self._forward, layer=layer) for layer in groups]
        return in_groups(chunks, list(groups.values()), compute)

    def _forward(self, chunks: Sequence[Chunk], layer: int) -> RunnerOutput:
        """Compute chunks that enter the model after the attention of `layer`; -1: at layer 0."""
        states = [_state(chunk) for chunk in chunks]
        entered = [state.entered for state in states]
        step = self._begin(chunks, layer)
        streams = _stored_streams(step, chunks)
        ends = [*accumulate(len(chunk.ids) for chunk in chunks)]
        kept_rows: list[int] = []
        for chunk, end in zip(chunks, ends, strict=True):
            kept_rows += range(end - chunk.keep, end)
        rows_R = torch.tensor(kept_rows, dtype=torch.long, device=self.model.device)
        logits_RV = self.model.logits(step.finish(rows=rows_R)[0]).float().cpu()
        speakers = speakers_of(step.ctx.armed, ends[-1])
        segments = []
        for chunk, state, end, part in zip(chunks, states, ends, entered, strict=True):
            state.length += len(chunk.ids)
            own_streams = {
                cut: stream[:, end - len(chunk.ids) : end] for cut, stream in streams.items()
            }
            segments.append(_segments(chunk, part, own_streams))
        return RunnerOutput(logits_RV, tuple(speakers[row] for row in kept_rows), tuple(segments))

    def _begin(self, chunks: Sequence[Chunk], layer: int) -> ForwardPass:
        """Return the pass over chunks that enter after the attention of `layer`; -1: at layer 0."""
        states = [_state(chunk) for chunk in chunks]
        starts = [state.length for state in states]
        parts = [
            RaggedChunk(chunk.ids, start, state.cache)
            for chunk, start, state in zip(chunks, starts, states, strict=True)
        ]
        if layer < 0:
            return begin_ragged(self.model, parts)
        streams = [state.streams.pop(start)[1] for state, start in zip(states, starts, strict=True)]
        return resume_ragged(self.model, parts, torch.cat(streams, 1), layer)


def _state(chunk: Chunk) -> TorchState:
    assert isinstance(chunk.state, TorchState)
    return chunk.state


def _segments(chunk: Chunk, entered: int, streams: Mapping[int, Tensor]) -> dict[int, Segment]:
    """Return the segments of a chunk that its `store` asks for, by part.

    Args:
        chunk: the chunk, whose state has its tokens.
        entered: part at whose end it entered the model; -1: at layer 0.
        streams: its residual stream `[1, T, D]` at each cut above.
    """
    state = _state(chunk)
    tokens = range(state.length - len(chunk.ids), state.length)
    segments: dict[int, Segment] = {}
    for index in chunk.store:
        if index > entered:
            part = state.parts[index]
            stream_BTD = None if part.cut is None else streams[part.cut]
            segments[index] = state.cache.segment(tokens, part, stream_BTD)
    return segments


def _entry_layer(chunk: Chunk) -> int:
    """Return the layer after whose attention a chunk enters the model; -1: at layer 0."""
    state = _state(chunk)
    cut = state.parts[state.entered].cut if state.entered >= 0 else None
    return -1 if cut is None else cut


def _stored_streams(step: ForwardPass, chunks: Sequence[Chunk]) -> dict[int, Tensor]:
    """Run a pass up to the last cut at which a chunk is stored, and return the residual stream
    `[1, N, D]` at each cut above its first layer.
    """
    parts = [_state(chunk).parts[index] for chunk in chunks for index in chunk.store]
    cuts = sorted({part.cut for part in parts if part.cut is not None})
    streams = {}
    for cut in cuts:
        if cut > step.layer or not step.attended:
            step.run_to(cut)
            streams[cut] = step.attend()
    return streams
