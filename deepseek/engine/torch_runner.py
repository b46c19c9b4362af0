"""The reference runner: runs the PyTorch model on ragged batches. It supports every architecture
and every expert.
"""

from collections.abc import Sequence

import torch

from deepseek.engine.reference import ReferenceRunner
from deepseek.model.experts.armed import ArmedExperts
from deepseek.model.experts.ragged import speakers_of
from deepseek.model.kv_cache import CacheSegment, KVCache
from deepseek.model.ragged import begin_ragged
from deepseek.model.transformer import DeepSeekModel
from deepseek.runner import Chunk, RunnerOutput, Segment


class TorchState:
    """The key/value cache of one sequence.

    Args:
        armed: the sequence's experts; None for the base alone.
        layers: number of layers of the model.
        capacity: maximum number of tokens, for which memory is kept.
    """

    def __init__(self, armed: ArmedExperts | None, layers: int, capacity: int) -> None:
        self.cache = KVCache()
        self.cache.reserve(layers, capacity)
        self.cache.armed, self.cache.started = armed, True

    @property
    def length(self) -> int:
        return int(self.cache.get_seq_length())

    @property
    def nbytes(self) -> int:
        return self.cache.nbytes

    def segment(self, start: int) -> CacheSegment:
        return self.cache.segment(start)

    def extend(self, segment: Segment) -> None:
        assert isinstance(segment, CacheSegment)
        self.cache.extend(segment)

    def close(self) -> None:
        self.cache = KVCache()


class TorchRunner(ReferenceRunner):
    """Runs a `DeepSeekModel` on its own device, all chunks of a step in one pass.

    Every weight is read once a step, so 16 sequences cost little more than one. A chunk's logits
    beside others differ from those alone in the tests by at most 1e-4 in fp32 (5e-4 with dynamic
    positions), with the same experts attributed.
    Padding a lone row to a fixed block of rows would make the bits equal, and a lone sequence up to
    2.5 times as slow (docs/log/engine.md, 2026-11-26).

    Args:
        model: the model to run.
    """

    def __init__(self, model: DeepSeekModel) -> None:
        self.model = model

    def cache_bytes(self, length: int) -> int:
        return self.model.state_bytes(length)

    def start(self, armed: ArmedExperts | None, capacity: int) -> TorchState:
        return TorchState(armed, len(self.model.layers), capacity)

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk]) -> RunnerOutput:
        parts: list[tuple[Sequence[int], KVCache]] = []
        kept_rows: list[int] = []
        end = 0
        for chunk in chunks:
            assert isinstance(chunk.state, TorchState)
            parts.append((chunk.ids, chunk.state.cache))
            end += len(chunk.ids)
            kept_rows += range(end - chunk.keep, end)
        step = begin_ragged(self.model, parts)
        rows_R = torch.tensor(kept_rows, dtype=torch.long, device=self.model.device)
        logits_RV = self.model.lm_head(step.finish(rows=rows_R)[0]).float().cpu()
        speakers = speakers_of(step.ctx.armed, end)
        return RunnerOutput(logits_RV, tuple(speakers[row] for row in kept_rows))
