"""What the engine asks of whatever computes the model: ragged batches of chunks, one forward pass a
step.

`engine/torch_runner.py` has the reference, which runs every architecture and every expert;
`compiled/runner.py` a faster one, which need only behave as it does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from deepseek.model.experts.armed import ArmedExperts
from deepseek.model.experts.module import ExpertModule


class Segment(Protocol):
    """A copy of what a stretch of tokens left in a state; the prefix cache keeps it. Nobody changes
    it.
    """

    @property
    def nbytes(self) -> int: ...


class SequenceState(Protocol):
    """Keys, values and running sums of one sequence.

    A state is used by one thread at a time, and by one chunk of a batch at most.
    """

    @property
    def length(self) -> int:
        """Number of tokens that it holds."""

    @property
    def nbytes(self) -> int:
        """Memory that it occupies now, at most `Runner.state_bytes` of its capacity."""

    @property
    def rewinds(self) -> bool:
        """Whether `rewind` works."""

    def rewind(self, length: int) -> None:
        """Forget the tokens from `length` on, all of the last chunk."""

    def segment(self, start: int) -> Segment:
        """Return a copy of what the tokens from `start` to the last one left behind.

        The running sums of the experts' gates after the last token are part of it, so that a state
        into which it has been put goes on as this one does.
        """

    def extend(self, segment: Segment) -> None:
        """Append the tokens of `segment`, taken at this state's length from a state with the same
        armed experts.
        """

    def close(self) -> None:
        """Free the memory; the state is not used again."""


@dataclass(frozen=True)
class Chunk:
    """New tokens of one sequence: a piece of a prompt, or the one token chosen last.

    Attributes:
        state: the tokens before them; the forward pass adds the new ones.
        ids: the new tokens, at least one; where the state rewinds, guesses may follow the token
            chosen last.
        keep: how many of them, the last ones, need logits; within a prompt none.
    """

    state: SequenceState
    ids: Sequence[int]
    keep: int = 1


@dataclass(frozen=True)
class RunnerOutput:
    """What a forward pass says about the kept tokens, in the order of chunks and of tokens within
    them.

    Attributes:
        logits_RV: next-token logits in fp32, one row for each kept token, on the CPU. The caller
            may overwrite them.
        experts: for each row the name of the expert with the largest weight there, None where none
            fired.
    """

    logits_RV: Tensor
    experts: tuple[str | None, ...]


class Runner(Protocol):
    """Computes a model for many sequences at once.

    The result for a chunk depends on that chunk and its state alone, to the last bit, never on the
    other chunks of the batch: that is what makes the same request give the same tokens whatever
    else runs.
    """

    def prepare(self, module: ExpertModule) -> None:
        """Do ahead what sequences with this expert will need (such as rounding weights).

        Called by the thread that plugs it, before a sequence can have it; another thread may be in
        `forward`.
        """

    def state_bytes(self, length: int, armed: ArmedExperts | None) -> int:
        """Return the most memory that a state of `length` tokens occupies. Any thread may ask."""

    def start(self, armed: ArmedExperts | None, capacity: int) -> SequenceState:
        """Return the empty state of a new sequence that will hold up to `capacity` tokens.

        Args:
            armed: the experts that speak in it until it ends; None for the base alone.
        """

    def forward(self, chunks: Sequence[Chunk]) -> RunnerOutput:
        """Add the chunks' tokens to their states and return the logits of those that are kept."""
