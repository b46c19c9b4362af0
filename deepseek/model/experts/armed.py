"""The plugged experts that take part in one forward pass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from deepseek.model.context import ForwardContext
from deepseek.model.experts.gate import GateBank
from deepseek.model.experts.module import ExpertModule
from deepseek.model.experts.relevance import RelevanceBank


@dataclass
class Trace:
    """What the experts did over several forward passes (see `ExpertSet.record`).

    parts: (module name, layer) -> weights `[B, T]` of each pass, on the CPU.
    """

    parts: dict[tuple[str, int], list[Tensor]] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the modules that took part, sorted."""
        return tuple(sorted({name for name, _ in self.parts}))

    def weights(self, name: str) -> Tensor:
        """Return the weight `[B, T]` of module `name` at every token, averaged over its layers."""
        return torch.stack(
            [torch.cat(parts, dim=1) for (owner, _), parts in self.parts.items() if owner == name]
        ).mean(0)

    def add(self, modules: Sequence[ExpertModule], layer_idx: int, weights_BTM: Tensor) -> None:
        """Append the weights of one layer in one forward pass."""
        for module, weights_BT in zip(
            modules, weights_BTM.detach().float().cpu().unbind(-1), strict=True
        ):
            self.parts.setdefault((module.name, layer_idx), []).append(weights_BT)


@dataclass(frozen=True)
class Roster:
    """Which modules are candidates, layer by layer.

    Modules are in the order of their content digests, never of their plugging, so that every plug
    order gives the same bits.

    Attributes:
        modules: all candidates.
        max_experts: most of them that one token is given to, as gates decide; None: all speak
            everywhere with weight 1.
    """

    modules: tuple[ExpertModule, ...]
    max_experts: int | None

    @cached_property
    def owners(self) -> dict[int, tuple[ExpertModule, ...]]:
        """Layer -> the candidates with an expert layer there, in the same order."""
        layers = sorted({layer for module in self.modules for layer in module.layers})
        return {
            layer: tuple(module for module in self.modules if layer in module.layers)
            for layer in layers
        }

    @cached_property
    def banks(self) -> dict[int, GateBank] | None:
        """Layer -> the gates of its owners; None without gates. Made when first asked for: few sets
        are ever used.
        """
        if self.max_experts is None:
            return None
        return {layer: _bank(own, layer, self.max_experts) for layer, own in self.owners.items()}

    @cached_property
    def relevance(self) -> RelevanceBank | None:
        """The candidates' tables of relevance; None if they have none, or are forced and not
        asked.
        """
        if self.max_experts is None:
            return None
        device = next(self.modules[0].parameters()).device
        return RelevanceBank.stack(self.modules, device)

    @cached_property
    def columns(self) -> dict[int, list[int]]:
        """Layer -> the places of its owners among all candidates."""
        places = {module: place for place, module in enumerate(self.modules)}
        return {layer: [places[module] for module in own] for layer, own in self.owners.items()}


class ArmedExperts:
    """The experts of one sequence: taken when it starts and kept until it ends, whatever is plugged
    meanwhile.

    Args:
        roster: the candidates.
        traces: recordings under way, shared with the `ExpertSet`.
        decided_BM: which candidates each row admits, where its text has been judged as a whole (B =
            1: every row the same ones); None: each token is judged by the tokens up to it.
    """

    def __init__(
        self, roster: Roster, traces: Sequence[Trace] = (), decided_BM: Tensor | None = None
    ) -> None:
        self._roster = roster
        self._banks = roster.banks  # made in the thread that asks, not in an engine's
        self._traces = traces
        self._decided_BM = decided_BM
        self._weights: dict[int, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, object]) -> "ArmedExperts":
        # A copied cache goes on with the same experts; their weights are not copied with it.
        return ArmedExperts(self._roster, self._traces, self._decided_BM)

    def with_rows(self, change: Callable[[Tensor], Tensor]) -> "ArmedExperts":
        """Return the experts of a cache whose rows are changed by `change`, which maps what has a
        row each.
        """
        if self._decided_BM is None or len(self._decided_BM) == 1:
            return self
        return ArmedExperts(self._roster, self._traces, change(self._decided_BM))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the candidates, in canonical order."""
        return tuple(module.name for module in self._roster.modules)

    @property
    def roster(self) -> Roster:
        """The candidates, layer by layer."""
        return self._roster

    @property
    def identity(self) -> str | None:
        """What these experts do, in words that equal those of no other set: content digests and
        most at one token.

        None if that cannot be said: a module is forced, or was made in memory.
        """
        digests = [module.digest for module in self._roster.modules]
        if self._banks is None or not all(digests):
            return None
        return f"[{self._roster.max_experts}] {digests}"

    def apply(self, layer_idx: int, x_BTD: Tensor, y_BTD: Tensor, ctx: ForwardContext) -> Tensor:
        """Return `y` plus what the modules add at this layer; tokens at which none fires keep their
        bits.
        """
        modules = self._roster.owners.get(layer_idx, ())
        if not modules:
            return y_BTD
        if self._banks is None:
            weights_BTM = x_BTD.new_ones(*x_BTD.shape[:2], len(modules), dtype=torch.float32)
            for module in modules:
                y_BTD = y_BTD + module(layer_idx, x_BTD).to(y_BTD.dtype)
        else:
            columns = self._roster.columns[layer_idx]
            words_BTM = self._words(ctx)
            weights_BTM = self._banks[layer_idx].weights(
                layer_idx,
                x_BTD,
                ctx,
                words_BTM=None if words_BTM is None else words_BTM[..., columns],
                admitted_BM=None if self._decided_BM is None else self._decided_BM[:, columns],
            )
            y_BTD = combine(modules, layer_idx, x_BTD, y_BTD, weights_BTM)
        self._weights[layer_idx] = weights_BTM
        for trace in self._traces:
            trace.add(modules, layer_idx, weights_BTM)
        return y_BTD

    def _words(self, ctx: ForwardContext) -> Tensor | None:
        """Return the evidence of a document's words so far for each candidate `[B, T, M]`; None:
        they do not count.
        """
        bank = self._roster.relevance
        if self._decided_BM is not None or bank is None or ctx.input_ids_BT is None:
            return None
        if ctx.words_BTM is None:
            state_BM = ctx.cache.relevance_state if ctx.cache is not None else None
            sums_BTM, state_BM = bank.accumulate(
                ctx.input_ids_BT, state_BM, ctx.token_mask_BT, ctx.document_ids_BT
            )
            if ctx.cache is not None:
                ctx.cache.relevance_state = state_BM
            ctx.words_BTM = bank.of_document(sums_BTM)
        return ctx.words_BTM

    def attribution(self) -> Tensor:
        """Return the weights `[B, T, M]` of the latest forward pass, averaged over each module's
        layers.

        The order of M is that of `names`. Layers that have not run count as not there.
        """
        trace = Trace()
        for layer, weights_BTM in self._weights.items():
            trace.add(self._roster.owners[layer], layer, weights_BTM)
        return torch.stack([trace.weights(name) for name in self.names], dim=-1)


def combine(
    modules: Sequence[ExpertModule],
    layer_idx: int,
    x_BTD: Tensor,
    y_BTD: Tensor,
    weights_BTM: Tensor,
) -> Tensor:
    """Return `y + sum_m weight_m module_m(x)`, computing each module only at the tokens where its
    weight is not 0.
    """
    if torch.compiler.is_exporting():  # a graph computes every module everywhere
        added = [one(layer_idx, x_BTD) * weights_BTM[..., m, None] for m, one in enumerate(modules)]
        return y_BTD + torch.stack(added).sum(0).to(y_BTD.dtype)
    weights_NM = weights_BTM.flatten(0, 1)
    x_ND = x_BTD.flatten(0, 1)
    y_ND = y_BTD.flatten(0, 1)
    for m, speaks in enumerate((weights_NM > 0).any(dim=0).tolist()):
        if speaks:
            rows = weights_NM[:, m].nonzero().squeeze(1)
            added = modules[m](layer_idx, x_ND[rows]) * weights_NM[rows, m, None]
            y_ND = y_ND.index_add(0, rows, added.to(y_ND.dtype))
    return y_ND.view_as(y_BTD)


def _bank(own: tuple[ExpertModule, ...], layer: int, max_experts: int) -> GateBank:
    gates, moments = zip(
        *((module.gates[layer], module.moments[layer]) for module in own), strict=True
    )
    device = own[0].at(layer).down_proj.device
    return GateBank.stack(
        gates, moments, [module.settings.half_life for module in own], max_experts, device
    )
