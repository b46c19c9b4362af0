"""The reference runner: runs the PyTorch model, one sequence after another. It supports every
architecture and every expert.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from deepseek.model.experts.adapter import AdapterModule
from deepseek.model.experts.armed import ArmedExperts
from deepseek.model.experts.module import ExpertModule
from deepseek.model.kv_cache import CacheSegment, KVCache
from deepseek.model.output import ModelOutput
from deepseek.model.transformer import DeepSeekModel
from deepseek.runner import Chunk, RunnerOutput, Segment


class TorchState:
    """The key/value cache of one sequence.

    Args:
        armed: the sequence's experts; None for the base alone.
    """

    # PyTorch's results for a token can differ in the last bits with the tokens computed beside it,
    # so guessed tokens would change the output.
    rewinds = False

    def __init__(self, armed: ArmedExperts | None) -> None:
        self.cache = KVCache()
        self.cache.armed, self.cache.started = armed, True

    @property
    def length(self) -> int:
        return int(self.cache.get_seq_length())

    @property
    def nbytes(self) -> int:
        return self.cache.nbytes

    def rewind(self, length: int) -> None:
        """Raise `NotImplementedError`: the engine asks only states whose `rewinds` is True."""
        raise NotImplementedError

    def segment(self, start: int) -> CacheSegment:
        return self.cache.segment(start)

    def extend(self, segment: Segment) -> None:
        assert isinstance(segment, CacheSegment)
        self.cache.extend(segment)

    def close(self) -> None:
        self.cache = KVCache()


class TorchRunner:
    """Runs a `DeepSeekModel` on its own device.

    Args:
        model: the model to run.
    """

    def __init__(self, model: DeepSeekModel) -> None:
        self.model = model

    def computes(self, armed: ArmedExperts | None) -> bool:
        """Return True: the model computes whatever can be plugged into it."""
        return True

    def prepare(self, module: ExpertModule | AdapterModule) -> None:
        """Do nothing: `plug` has already moved the expert to the model's device."""

    def state_bytes(self, length: int, armed: ArmedExperts | None) -> int:
        gate_bytes = (
            sum(12 * len(owners) for owners in armed.roster.owners.values())
            if armed is not None
            else 0
        )
        return self.model.state_bytes(length) + gate_bytes

    def start(self, armed: ArmedExperts | None, capacity: int) -> TorchState:
        return TorchState(armed)

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk]) -> RunnerOutput:
        rows: list[Tensor] = []
        experts: list[str | None] = []
        for chunk in chunks:
            assert isinstance(chunk.state, TorchState)
            ids = torch.tensor([chunk.ids], device=self.model.device)
            # `logits_to_keep=0` would mean all logits; an empty index means none.
            keep = chunk.keep or torch.tensor([], dtype=torch.long)
            output = self.model(ids, cache=chunk.state.cache, logits_to_keep=keep)
            rows.append(output.logits[0].float().cpu())
            experts += speakers(output, len(rows[-1]))
        return RunnerOutput(torch.cat(rows), tuple(experts))


def speakers(output: ModelOutput, count: int) -> list[str | None]:
    """Return, for each of the last `count` positions, the expert with the largest weight.

    Args:
        output: a forward pass over one sequence.
        count: number of positions.

    Returns:
        The experts' names. Where no expert fired, an adapter's, which acts at every token; None
        if none is armed.
    """
    if output.experts is None or count == 0:
        return [None] * count
    adapter: str | None = output.experts.strongest_adapter
    if not output.experts.names:
        return [adapter] * count
    weights_TM: Tensor = output.experts.attribution()[0, -count:]
    names = output.experts.names
    return [names[int(row.argmax())] if bool((row > 0).any()) else adapter for row in weights_TM]
