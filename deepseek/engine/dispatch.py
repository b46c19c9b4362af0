"""Two runners for one batch: sequences that the fast one does not support run on the reference."""

from collections.abc import Mapping, Sequence
from weakref import WeakSet

from deepseek.model.experts.adapter import AdapterModule
from deepseek.model.experts.armed import ArmedExperts
from deepseek.model.experts.module import ExpertModule
from deepseek.runner import Chunk, Runner, RunnerOutput, SequenceState, in_groups


class DispatchingRunner:
    """Runs each sequence, from its first to its last token, on the first runner that computes it.

    The two never share keys and values: the armed experts, which decide between them, are part of
    the prefix cache's key, and only states of the fast runner are divided.

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

    def expert_bytes(self, armed: ArmedExperts | None) -> Mapping[ExpertModule, int]:
        return self._runner(armed).expert_bytes(armed)

    def divides(self, armed: ArmedExperts | None) -> bool:
        return self._fast.computes(armed) and self._fast.divides(armed)

    def start(
        self, armed: ArmedExperts | None, capacity: int, cuts: tuple[int, ...] = ()
    ) -> SequenceState:
        runner = self._runner(armed)
        state = runner.start(armed, capacity, cuts)
        if runner is self._reference:
            self._on_reference.add(state)
        return state

    def forward(self, chunks: Sequence[Chunk]) -> RunnerOutput:
        runners: dict[int, Runner] = {0: self._fast, 1: self._reference}
        groups: dict[int, list[int]] = {}
        for index, chunk in enumerate(chunks):
            groups.setdefault(chunk.state in self._on_reference, []).append(index)
        compute = [runners[slow].forward for slow in groups]
        return in_groups(chunks, list(groups.values()), compute)

    def _runner(self, armed: ArmedExperts | None) -> Runner:
        return self._fast if self._fast.computes(armed) else self._reference
