"""The armed experts of many sequences that one forward pass computes together."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from deepseek.model.context import Armed, GateContext
from deepseek.model.experts.armed import ArmedExperts, Roster, attribution, combine


class SequenceContext(GateContext, Protocol):
    """The context of one sequence: a `ForwardContext`, or that of an attached model."""

    @property
    def armed(self) -> Armed | None: ...

    @property
    def length(self) -> int: ...


@dataclass
class Group:
    """The sequences with the same roster.

    Attributes:
        roster: the candidates of each of these sequences.
        parts: first token and context of each sequence.
        weights: layer -> the weights `[1, R, M]` of its modules at the R tokens of the group.
    """

    roster: Roster
    parts: list[tuple[int, SequenceContext]] = field(default_factory=list)
    weights: dict[int, Tensor] = field(default_factory=dict)

    @property
    def rows(self) -> list[int]:
        """Indices of the tokens of the group."""
        return [row for start, part in self.parts for row in range(start, start + part.length)]

    def factors(self, name: str) -> float | Tensor:
        """Return the factor on what an adapter adds, or one for each token, `[R, 1]`, if the
        sequences set different ones.
        """
        factors = []
        for _, part in self.parts:
            assert isinstance(part.armed, ArmedExperts)
            factors += [part.armed.factors.get(name, 1.0)] * part.length
        if len(set(factors)) == 1:
            return factors[0]
        return torch.tensor(factors, device=self.parts[0][1].position_ids_BT.device)[:, None]


class RaggedExperts:
    """The armed experts of sequences that lie end to end in one row.

    Each sequence has gates and running sums of its own. Sequences with the same roster share a call
    of each module, so that the module's weights are read once.

    Args:
        sequences: contexts of the sequences, in the order of their tokens.
    """

    def __init__(self, sequences: Sequence[SequenceContext]) -> None:
        groups: dict[Roster, Group] = {}
        start = 0
        for sequence in sequences:
            if isinstance(sequence.armed, ArmedExperts):
                roster = sequence.armed.roster
                groups.setdefault(roster, Group(roster)).parts.append((start, sequence))
            start += sequence.length
        self._total = start
        device = sequences[0].position_ids_BT.device
        self._groups = [
            (group, torch.tensor(group.rows, device=device)) for group in groups.values()
        ]

    def apply(self, layer_idx: int, x_BTD: Tensor, y_BTD: Tensor, ctx: GateContext) -> Tensor:
        """Return `y` plus the weighted outputs of the modules at this layer, `[1, N, D]`.

        Args:
            layer_idx: index of the layer.
            x_BTD: gate input `[1, N, D]`, the normed hidden states.
            y_BTD: output `[1, N, D]` of the layer's own feed-forward network.
            ctx: context of the forward pass; the contexts of the sequences are used.
        """
        for group, rows_R in self._groups:
            modules = group.roster.owners.get(layer_idx, ())
            if not modules:
                continue
            weights_1RM = torch.cat([_weights(layer_idx, x_BTD, part) for part in group.parts], 1)
            group.weights[layer_idx] = weights_1RM
            weights_1NM = weights_1RM.new_zeros(1, self._total, len(modules))
            weights_1NM[:, rows_R] = weights_1RM
            y_BTD = combine(modules, layer_idx, x_BTD, y_BTD, weights_1NM)
        return y_BTD

    @property
    def adapts(self) -> bool:
        """Whether an adapter is armed for one of the sequences."""
        return any(group.roster.adapters for group, _ in self._groups)

    def adapt(self, site: str, x: Tensor, y: Tensor) -> Tensor:
        """Return the output `y` of a linear layer plus the changes of the armed adapters.

        Args:
            site: name of the layer.
            x: input of the layer for all tokens, `[..., N, D]`.
            y: output of the layer, `[..., N, F]`.
        """
        # A stock layer may read several rows of each sequence, such as all latents of its cache.
        each = x.numel() // x.shape[-1] // self._total
        x_NSD = x.reshape(self._total, each, x.shape[-1])
        for group, rows_R in self._groups:
            for adapter in group.roster.adapters:
                factor = group.factors(adapter.name)
                factor = factor[:, None] if isinstance(factor, Tensor) else factor
                delta_RSF = adapter.change(site, x_NSD[rows_R], factor)
                if delta_RSF is not None:
                    y_NSF = y.reshape(self._total, each, y.shape[-1])
                    y = y_NSF.index_add(0, rows_R, delta_RSF.to(y.dtype)).view_as(y)
        return y

    def speakers(self) -> list[str | None]:
        """Return, for each token, the expert with the largest weight in the latest forward pass.

        Where no expert fired, it is an adapter, which acts at every token; None if none is armed.
        """
        names: list[str | None] = [None] * self._total
        for group, rows_R in self._groups:
            for start, part in group.parts:
                assert isinstance(part.armed, ArmedExperts)
                adapter = part.armed.strongest_adapter
                names[start : start + part.length] = [adapter] * part.length
            modules = group.roster.modules
            # Without weights, no layer of these modules has run: the pass resumed above them.
            if not group.weights:
                continue
            best = attribution(group.roster, group.weights)[0].max(dim=-1)
            for row, weight, index in zip(
                rows_R.tolist(), best.values.tolist(), best.indices.tolist(), strict=True
            ):
                if weight > 0:
                    names[row] = modules[index].name
        return names


def _weights(layer_idx: int, x_1ND: Tensor, part: tuple[int, SequenceContext]) -> Tensor:
    """Return the weights `[1, T, M]` of one sequence's modules at its T tokens."""
    start, sequence = part
    armed = sequence.armed
    assert isinstance(armed, ArmedExperts)
    return armed.weights(layer_idx, x_1ND[:, start : start + sequence.length], sequence)


def speakers_of(armed: Armed | None, count: int) -> list[str | None]:
    """Return, for each of `count` tokens of sequences that lie end to end, the expert with the
    largest weight; None if none is armed.
    """
    return armed.speakers() if isinstance(armed, RaggedExperts) else [None] * count
