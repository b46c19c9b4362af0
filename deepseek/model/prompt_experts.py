"""The experts of a call of Hugging Face's `generate`, chosen by its whole prompt.

Generated tokens are not evidence of what the user asked about. So the choice is made when the first
forward pass is prepared, and the cache keeps it. Without a cache, `generate` passes the same
`PromptExperts` to every pass.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from deepseek.errors import PackError
from deepseek.model.experts import ExpertSet
from deepseek.model.experts.armed import ArmedExperts


class PinnedExperts(Protocol):
    """Holds the experts of sequences: a cache, or `PromptExperts`.

    Attributes:
        armed: the experts; None: the base alone.
        started: whether `armed` has been set.
    """

    armed: ArmedExperts | None
    started: bool


@dataclass
class PromptExperts:
    """Keeps the experts of a call of `generate` without a cache (see `PinnedExperts`)."""

    armed: ArmedExperts | None = None
    started: bool = False


def pin(
    pinned: PinnedExperts,
    experts: ExpertSet,
    input_ids: Tensor,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None,
) -> None:
    """Pin the experts that prompts admit, unless the sequences have started.

    Args:
        pinned: keeps the experts.
        experts: the experts of the model.
        input_ids: the prompts `[B, T]`.
        inputs_embeds: embeddings `[B, T, D]` in place of the prompts. Their relevance cannot be
            scored, so they admit every armed expert. None: `input_ids` are scored.
        attention_mask: 0 at padding, `[B, T]`; None: no padding.
    """
    if pinned.started:
        return
    pinned.armed = (
        experts.decided(input_ids.long(), attention_mask)
        if inputs_embeds is None
        else _all_admitted(experts)
    )
    pinned.started = True


def _all_admitted(experts: ExpertSet) -> ArmedExperts | None:
    """Return the armed experts, all admitted whatever the relevance of later tokens."""
    while True:
        armed = experts.armed()
        if armed is None or armed.roster.relevance is None:
            return armed
        members = armed.roster.members
        try:
            # Experts that are named are admitted without a relevance test.
            return experts.choose(
                {member.name: armed.factors.get(member.name, 1.0) for member in members}
            )
        except PackError:
            continue  # another thread has unplugged one of them meanwhile
