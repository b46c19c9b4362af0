"""The interface between the engine and the runners that compute the model: ragged batches of
chunks, one forward pass a step.

`engine/torch_runner.py` is the reference, which supports every architecture and every expert.
`compiled/runner.py` is faster, supports fewer models, and has to behave like the reference.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from deepseek.model.experts.adapter import AdapterModule
from deepseek.model.experts.armed import ArmedExperts
from deepseek.model.experts.module import ExpertModule


class Segment(Protocol):
    """An immutable copy of the state of a range of tokens, for the prefix cache."""

    @property
    def nbytes(self) -> int:
        """Memory of the segment in bytes."""


class SequenceState(Protocol):
    """Keys, values and running gate sums of one sequence.

    A state is used by one thread at a time, and by at most one chunk of a batch.
    """

    @property
    def length(self) -> int:
        """Number of tokens in the state."""

    @property
    def nbytes(self) -> int:
        """Current memory in bytes, at most `Runner.state_bytes` of its capacity."""

    def segment(self, start: int) -> Segment:
        """Return a copy of the state of the tokens from `start` to the last one.

        It includes the running sums of the experts' gates after the last token, so that a state
        that it is appended to continues exactly as this one does.

        Args:
            start: position of the first token to copy.
        """

    def extend(self, segment: Segment) -> None:
        """Append the tokens of a segment.

        Args:
            segment: taken at this state's length, from a state with the same armed experts.
        """

    def close(self) -> None:
        """Free the memory; the state must not be used again."""


@runtime_checkable
class Rewindable(Protocol):
    """A state that can drop its last tokens, so that tokens can be guessed.

    That requires a runner whose result for a token does not depend on the tokens computed beside
    it: otherwise guesses would change the output.
    """

    def rewind(self, length: int) -> None:
        """Drop the tokens from position `length` on, which must all belong to the last chunk.

        Args:
            length: number of tokens to keep.
        """


@dataclass(frozen=True)
class Chunk:
    """New tokens of one sequence: a piece of its prompt, or the last sampled token.

    Attributes:
        state: state of the preceding tokens; the forward pass appends the new ones.
        ids: the new tokens, at least one. If the state can rewind, guessed tokens may follow the
            last sampled one.
        keep: number of tokens, at the end of the chunk, whose logits are needed; 0 within a prompt,
            default 1.
    """

    state: SequenceState
    ids: Sequence[int]
    keep: int = 1


@dataclass(frozen=True)
class RunnerOutput:
    """Result of a forward pass for the kept tokens, ordered by chunk and position.

    Attributes:
        logits_RV: next-token logits in fp32 on the CPU, one row for each kept token. The caller may
            overwrite them.
        experts: for each row, the name of the expert with the largest weight; None if no expert
            fired.
    """

    logits_RV: Tensor
    experts: tuple[str | None, ...]


class Runner(Protocol):
    """Computes a model for many sequences at once.

    The result for a chunk depends on that chunk and its state alone, never on the content of the
    rest of the batch. Each runner states whether this holds bit for bit, or up to the rounding of
    products whose order of summation depends on the number of rows.
    """

    def computes(self, armed: ArmedExperts | None) -> bool:
        """Return whether this runner computes sequences with these experts; thread safe.

        The other methods are only called for such sequences.

        Args:
            armed: the sequence's experts; None for the base alone.
        """

    def prepare(self, module: ExpertModule | AdapterModule) -> None:
        """Do the one-time work for an expert in advance, such as quantising its weights.

        The thread that plugs the expert calls this before any sequence can use it; another thread
        may be in `forward`.

        Args:
            module: the expert or adapter.
        """

    def state_bytes(self, length: int, armed: ArmedExperts | None) -> int:
        """Return the maximum memory of a state in bytes; thread safe.

        Args:
            length: number of tokens in the state.
            armed: the sequence's experts; None for the base alone.
        """

    def start(self, armed: ArmedExperts | None, capacity: int) -> SequenceState:
        """Return the empty state of a new sequence.

        Args:
            armed: the experts for the whole sequence; None for the base alone.
            capacity: maximum number of tokens.
        """

    def forward(self, chunks: Sequence[Chunk]) -> RunnerOutput:
        """Run one forward pass: append the chunks' tokens to their states.

        Args:
            chunks: at most one chunk for each state.

        Returns:
            Logits and experts of the kept tokens.
        """
