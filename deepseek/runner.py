"""The interface between the engine and the runners that compute the model: ragged batches of
chunks, one forward pass a step.

`engine/torch_runner.py` is the reference, which supports every architecture and every expert.
`compiled/runner.py` is faster, supports fewer models, and has to behave like the reference.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from deepseek.model.experts.adapter import AdapterModule
from deepseek.model.experts.armed import ArmedExperts
from deepseek.model.experts.module import ExpertModule


class Segment(Protocol):
    """An immutable copy of the state of a chunk's tokens at one part of the layers, for the prefix
    cache.

    It includes the running sums of the experts' gates after the last token, so that a state that it
    is appended to continues exactly as the one that it was taken from.
    """

    @property
    def nbytes(self) -> int:
        """Memory of the segment in bytes."""

    @property
    def stream_bytes(self) -> int:
        """Those of them that the residual stream at the part's cut takes; 0: the uppermost part."""


class SequenceState(Protocol):
    """Keys, values and running gate sums of one sequence.

    A state is used by one thread at a time, and by at most one chunk of a batch.
    """

    @property
    def length(self) -> int:
        """Number of tokens in the state."""

    @property
    def nbytes(self) -> int:
        """Current memory in bytes, at most `Runner.state_bytes` of its capacity, and the residual
        streams of segments that it was extended by.
        """

    def extend(self, segment: Segment) -> None:
        """Append the tokens of a segment to the layers that it covers.

        Tokens whose upper layers are missing do not count for `length`: they are computed next, in
        the same chunks as those of the segments, and only in the upper layers.

        Args:
            segment: taken where these layers of this state end, from a state with the same cuts in
                which the same experts acted below the end of the segment's part. Lower parts come
                first.
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
        store: parts of the layers, from 0 at the bottom, whose segments of this chunk are needed.
    """

    state: SequenceState
    ids: Sequence[int]
    keep: int = 1
    store: Collection[int] = ()


@dataclass(frozen=True)
class RunnerOutput:
    """Result of a forward pass for the kept tokens, ordered by chunk and position.

    Attributes:
        logits_RV: next-token logits in fp32 on the CPU, one row for each kept token. The caller may
            overwrite them.
        experts: for each row, the name of the expert with the largest weight; of the strongest
            armed adapter if no expert fired, and None without one.
        segments: for each chunk, its segments by part, out of those that its `store` asks for. A
            part whose layers came from the cache is left out.
    """

    logits_RV: Tensor
    experts: tuple[str | None, ...]
    segments: tuple[Mapping[int, Segment], ...]


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

    def expert_bytes(self, armed: ArmedExperts | None) -> Mapping[ExpertModule, int]:
        """Return the memory in bytes that a sequence needs for each of its experts whose weights
        are read when they are needed; thread safe.

        Args:
            armed: the sequence's experts; None for the base alone.
        """

    def divides(self, armed: ArmedExperts | None) -> bool:
        """Return whether the states of sequences with these experts may have cuts; thread safe.

        Args:
            armed: the sequence's experts; None for the base alone.
        """

    def state_bytes(self, length: int, armed: ArmedExperts | None) -> int:
        """Return the maximum memory of a state in bytes, without the residual streams of segments
        that it was extended by; thread safe.

        Args:
            length: number of tokens in the state.
            armed: the sequence's experts; None for the base alone.
        """

    def start(
        self, armed: ArmedExperts | None, capacity: int, cuts: tuple[int, ...] = ()
    ) -> SequenceState:
        """Return the empty state of a new sequence, after reading the weights of its experts that
        are not in memory.

        Args:
            armed: the experts for the whole sequence; None for the base alone.
            capacity: maximum number of tokens.
            cuts: layers at which the state is divided into parts (see `model/layer_parts.py`);
                default: one part.
        """

    def forward(self, chunks: Sequence[Chunk]) -> RunnerOutput:
        """Run one forward pass: append the chunks' tokens to their states.

        Args:
            chunks: at most one chunk for each state.

        Returns:
            Logits and experts of the kept tokens.
        """


def in_groups(
    chunks: Sequence[Chunk],
    groups: Sequence[Sequence[int]],
    compute: Sequence[Callable[[Sequence[Chunk]], RunnerOutput]],
) -> RunnerOutput:
    """Compute a batch group by group, and return the result as that of one forward pass.

    Args:
        chunks: the chunks of the batch.
        groups: indices of the chunks of each group.
        compute: computes the chunks of a group, one function for each group.
    """
    if len(groups) == 1:
        return compute[0](chunks)
    rows: list[Tensor] = [torch.empty(0)] * len(chunks)
    experts: list[tuple[str | None, ...]] = [()] * len(chunks)
    segments: list[Mapping[int, Segment]] = [{}] * len(chunks)
    for group, forward in zip(groups, compute, strict=True):
        own = [chunks[index] for index in group]
        output = forward(own)
        parts_RV = output.logits_RV.split([chunk.keep for chunk in own])
        first = 0
        for place, index in enumerate(group):
            rows[index] = parts_RV[place]
            experts[index] = output.experts[first : first + own[place].keep]
            segments[index] = output.segments[place]
            first += own[place].keep
    return RunnerOutput(
        torch.cat(rows), tuple(name for names in experts for name in names), tuple(segments)
    )
