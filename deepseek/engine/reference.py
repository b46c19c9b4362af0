"""Base class of the runners on PyTorch, which support everything that can be plugged."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from deepseek.model.experts.adapter import AdapterModule
from deepseek.model.experts.armed import ArmedExperts
from deepseek.model.experts.module import ExpertModule, read_weights
from deepseek.runner import Chunk, RunnerOutput, SequenceState


class ReferenceRunner(ABC):
    """A `Runner` that supports every expert.

    PyTorch sums a product in an order that depends on the number of rows, so a chunk's logits
    beside others differ in the last bits from those alone. Its states therefore cannot rewind:
    guessed tokens would change the output.
    """

    def computes(self, armed: ArmedExperts | None) -> bool:
        """Return True."""
        return True

    def prepare(self, module: ExpertModule | AdapterModule) -> None:
        """Read stored weights; `plug` has already moved others to the model's device."""
        if isinstance(module, ExpertModule) and module.stored is not None:
            module.form(read_weights)

    def expert_bytes(self, armed: ArmedExperts | None) -> dict[ExpertModule, int]:
        return {} if armed is None else {m: m.nbytes for m in armed.roster.stored}

    def state_bytes(self, length: int, armed: ArmedExperts | None) -> int:
        """Return the maximum memory of a state in bytes: its cache, and the sums of its gates."""
        gates = 0 if armed is None else armed.roster.state_bytes
        return self.cache_bytes(length) + gates

    @abstractmethod
    def cache_bytes(self, length: int) -> int:
        """Return the maximum memory of the cache of one sequence of `length` tokens, in bytes."""

    @abstractmethod
    def divides(self, armed: ArmedExperts | None) -> bool:
        """Return whether the states of sequences with these experts may have cuts."""

    def start(
        self, armed: ArmedExperts | None, capacity: int, cuts: tuple[int, ...] = ()
    ) -> SequenceState:
        for module in self.expert_bytes(armed):
            self.prepare(module)
        return self.empty_state(armed, capacity, cuts)

    @abstractmethod
    def empty_state(
        self, armed: ArmedExperts | None, capacity: int, cuts: tuple[int, ...]
    ) -> SequenceState:
        """Return the empty state of a sequence, whose experts are in memory (see `start`)."""

    @abstractmethod
    def forward(self, chunks: Sequence[Chunk]) -> RunnerOutput: ...
