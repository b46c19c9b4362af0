"""Two runners for one batch: sequences that the fast one does not compute run on the reference."""

from collections.abc import Sequence
from weakref import WeakSet

import torch

from deepseek.model.experts.adapter import AdapterModule
from deepseek.model.experts.armed import ArmedExperts
from deepseek.model.experts.module import ExpertModule
from deepseek.runner import Chunk, Runner, RunnerOutput, SequenceState


class DispatchingRunner:
    """Runs each sequence, from its first to its last token, on the first runner that computes it.

    The two never share keys and values: what decides between them, the armed experts, is part of
    the prefix cache's key.

    Args:
        fast: runner of the sequences whose experts it computes.
        reference: runner of all others.
    """

    def __init__(self, fast: Runner, reference: Runner) -> None:
        self._fast = fast
        self._reference = reference
        self._on_reference = WeakSet[SequenceState]()

    def computes(self, armed: ArmedExperts | None) -> bool:
        """Return whether one of the two computes these experts."""
        return self._fast.computes(armed) or self._reference.computes(armed)

    def prepare(self, module: ExpertModule | AdapterModule) -> None:
        """Prepare an expert in both runners."""
        self._fast.prepare(module)
        self._reference.prepare(module)

    def state_bytes(self, length: int, armed: ArmedExperts | None) -> int:
        return self._runner(armed).state_bytes(length, armed)

    def start(self, armed: ArmedExperts | None, capacity: int) -> SequenceState:
        runner = self._runner(armed)
        state = runner.start(armed, capacity)
        if runner is self._reference:
            self._on_reference.add(state)
        return state

    def forward(self, chunks: Sequence[Chunk]) -> RunnerOutput:
        is_slow = [chunk.state in self._on_reference for chunk in chunks]
        if not any(is_slow):
            return self._fast.forward(chunks)
        if all(is_slow):
            return self._reference.forward(chunks)
        parts = []
        for runner, wanted in ((self._fast, False), (self._reference, True)):
            own = [chunk for chunk, slow in zip(chunks, is_slow, strict=True) if slow is wanted]
            output = runner.forward(own)
            rows = zip(output.logits_RV, output.experts, strict=True)
            parts.append(iter(rows))
        rows_in_order = [
            next(parts[slow])
            for chunk, slow in zip(chunks, is_slow, strict=True)
            for _ in range(chunk.keep)
        ]
        if not rows_in_order:
            return output
        return RunnerOutput(
            torch.stack([logits_V for logits_V, _ in rows_in_order]),
            tuple(expert for _, expert in rows_in_order),
        )

    def _runner(self, armed: ArmedExperts | None) -> Runner:
        return self._fast if self._fast.computes(armed) else self._reference
