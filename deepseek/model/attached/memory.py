"""The state of armed experts, kept with a stock `transformers` cache.

`remembering` gives a cache of any class an `ExpertMemory`, and extends its class so that the memory
is reordered, repeated, selected and reset along with keys and values. A copied cache carries its
memory along.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import Cache

from deepseek.errors import ConfigError
from deepseek.model.attached.extend import Extension, extend_class
from deepseek.model.experts.armed import ArmedExperts
from deepseek.model.relevance_state import RelevanceState


@dataclass
class ExpertMemory:
    """The state of armed experts over the tokens of one batch of sequences.

    Attributes:
        gate_state: layer -> running sums of the gates `[B, 3, M]` (see `model/experts/gate.py`).
        relevance_state: accumulated evidence that the text is about each expert's domain.
        armed: the experts that the sequences started with; None: the base alone.
        started: whether `armed` has been set.
    """

    gate_state: dict[int, Tensor] = field(default_factory=dict)
    relevance_state: RelevanceState | None = None
    armed: ArmedExperts | None = None
    started: bool = False

    @property
    def nbytes(self) -> int:
        """Memory in use, in bytes."""
        return sum(sums.nbytes for sums in self.gate_state.values())

    def start(self, armed: ArmedExperts | None) -> None:
        """Pin the experts of new sequences."""
        self.armed = armed
        self.started = True

    def change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Select, repeat or reorder the sequences of the batch by `change`."""
        self.gate_state = {layer: change(sums) for layer, sums in self.gate_state.items()}
        if self.relevance_state is not None:
            self.relevance_state = self.relevance_state.with_rows(change)
        if self.armed is not None:
            self.armed = self.armed.with_rows(change)


class RemembersExperts(Extension, Cache):
    """Mixin for the class of a cache: keeps its `ExpertMemory` in step with keys and values."""

    expert_memory: ExpertMemory

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self.expert_memory.change_rows(
            lambda state: state.index_select(0, beam_idx.to(state.device))
        )

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.expert_memory.change_rows(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.expert_memory.change_rows(lambda state: state[indices])

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can restore an earlier state; running sums of gates cannot be undone."""
        return super().is_croppable and not self.expert_memory.gate_state

    def crop(self, tokens_to_remove: int) -> None:
        if self.expert_memory.gate_state:
            raise ConfigError(
                "A cache with armed experts cannot be cropped, because their gates keep running "
                "sums; disarm the experts for assisted decoding."
            )
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        super().reset()
        self.expert_memory = ExpertMemory()


def remembering(cache: Cache, memory: ExpertMemory | None = None) -> ExpertMemory:
    """Return the expert memory of a cache; a cache without one gets one.

    A cache that already holds tokens when it gets an empty memory continues without experts,
    because their gates have not seen its tokens.

    Args:
        cache: a cache of any class.
        memory: the memory for a cache without one; None: an empty one.
    """
    if not isinstance(cache, RemembersExperts):
        begun = memory is None and int(cache.get_seq_length()) > 0
        extend_class(cache, RemembersExperts)
        assert isinstance(cache, RemembersExperts)
        cache.expert_memory = ExpertMemory(started=begun) if memory is None else memory
    return cache.expert_memory
