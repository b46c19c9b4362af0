"""What the runners on PyTorch share: they compute whatever can be plugged into a model."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from deepseek.model.experts.adapter import AdapterModule
from deepseek.model.experts.armed import ArmedExperts
from deepseek.model.experts.module import ExpertModule
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

    def prepare(self, module: ExpertModule | AdapterModule) -> None:  # noqa: B027 - does nothing
        """Do nothing: `plug` has already moved the expert to the model's device."""

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

    @abstractmethod
    def start(
        self, armed: ArmedExperts | None, capacity: int, cuts: tuple[int, ...] = ()
    ) -> SequenceState: ...

    @abstractmethod
    def forward(self, chunks: Sequence[Chunk]) -> RunnerOutput: ...
