"""The armed experts of one sequence: evaluate their gates and add their outputs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from deepseek.model.context import GateContext
from deepseek.model.experts.gate import GateBank
from deepseek.model.experts.module import ExpertModule
from deepseek.model.experts.relevance import RelevanceBank


@dataclass
class Trace:
    """Recorded expert weights over several forward passes (see `ExpertSet.record`).

    Attributes:
        parts: (module name, layer) -> the weights `[B, T]` of each pass, on the CPU.
    """

    parts: dict[tuple[str, int], list[Tensor]] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the recorded modules, sorted."""
        return tuple(sorted({name for name, _ in self.parts}))

    def weights(self, name: str) -> Tensor:
        """Return the weights `[B, T]` of module `name`, averaged over its layers."""
        return torch.stack(
            [torch.cat(parts, dim=1) for (owner, _), parts in self.parts.items() if owner == name]
        ).mean(0)

    def add(self, modules: Sequence[ExpertModule], layer_idx: int, weights_BTM: Tensor) -> None:
        """Append the weights `[B, T, M]` of one layer in one forward pass."""
        for module, weights_BT in zip(
            modules, weights_BTM.detach().float().cpu().unbind(-1), strict=True
        ):
            self.parts.setdefault((module.name, layer_idx), []).append(weights_BT)


@dataclass(frozen=True)
class Roster:
    """The candidate modules and their gates, by layer.

    Modules are sorted by content digest, not by plug order, so that outputs are bit-identical for
    every plug order.

    Attributes:
        modules: all candidates.
        max_experts: maximum number of modules that fire at one token; None: no gates, every module
            fires at every token with weight 1.
    """

    modules: tuple[ExpertModule, ...]
    max_experts: int | None

    @cached_property
    def owners(self) -> dict[int, tuple[ExpertModule, ...]]:
        """Layer -> the candidates that have an expert layer there, in the same order."""
        layers = sorted({layer for module in self.modules for layer in module.layers})
        return {
            layer: tuple(module for module in self.modules if layer in module.layers)
            for layer in layers
        }

    @cached_property
    def banks(self) -> dict[int, GateBank] | None:
        """Layer -> the gates of its owners; None without gates.

        Built at first use, because most rosters are never used.
        """
        if self.max_experts is None:
            return None
        return {
            layer: _bank(modules, layer, self.max_experts) for layer, modules in self.owners.items()
        }

    @cached_property
    def relevance(self) -> RelevanceBank | None:
        """The relevance tables of the candidates; None if no candidate has one or gates are off."""
        if self.max_experts is None:
            return None
        device = next(self.modules[0].parameters()).device
        return RelevanceBank.stack(self.modules, device)

    @cached_property
    def columns(self) -> dict[int, list[int]]:
        """Layer -> the indices of its owners among all candidates."""
        indices = {module: index for index, module in enumerate(self.modules)}
        return {
            layer: [indices[module] for module in modules] for layer, modules in self.owners.items()
        }


class ArmedExperts:
    """The experts of one sequence, pinned from its first to its last token.

    Plugging and unplugging in between have no effect on the sequence.

    Args:
        roster: the candidates.
        traces: active recordings, shared with the `ExpertSet`.
        decided_BM: the admitted candidates of each row, if admission was decided for the text as a
            whole (B = 1: the same for every row). None: relevance is accumulated token by token.
    """

    def __init__(
        self, roster: Roster, traces: Sequence[Trace] = (), decided_BM: Tensor | None = None
    ) -> None:
        self._roster = roster
        self._banks = roster.banks  # built here, in the caller's thread, not in the engine's
        self._traces = traces
        self._decided_BM = decided_BM
        self._weights: dict[int, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, object]) -> "ArmedExperts":
        # A copied cache continues with the same experts and must not copy their weights.
        return ArmedExperts(self._roster, self._traces, self._decided_BM)

    def with_rows(self, change: Callable[[Tensor], Tensor]) -> "ArmedExperts":
        """Return the experts for a cache whose rows are selected or reordered by `change`."""
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
        """Cache key that identifies this set of experts: `max_experts` and the content digests.

        None if the set has no unique key because a module is forced or was created in memory.
        """
        digests = [module.digest for module in self._roster.modules]
        if self._banks is None or not all(digests):
            return None
        return f"[{self._roster.max_experts}] {digests}"

    def apply(self, layer_idx: int, x_BTD: Tensor, y_BTD: Tensor, ctx: GateContext) -> Tensor:
        """Return `y` plus the weighted outputs of the modules at this layer, `[B, T, D]`.

        Tokens at which no module fires keep `y` bit for bit.

        Args:
            layer_idx: index of the layer.
            x_BTD: gate input, the normed hidden states.
            y_BTD: output of the layer's own feed-forward network.
            ctx: context of the forward pass.
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

    def _words(self, ctx: GateContext) -> Tensor | None:
        """Return the accumulated relevance evidence `[B, T, M]` of a document, in nats.

        None if relevance plays no part: admission is already decided, no candidate has a table, or
        the pass runs on embeddings.
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
        """Return the weights `[B, T, M]` of the latest forward pass, averaged over layers.

        M is in the order of `names`. Layers that have not run are left out of the average.
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
    """Return `y + sum_m weight_m module_m(x)`.

    Each module is computed only at the tokens where its weight is not 0.
    """
    # An exported graph cannot branch on values, so it computes every module at every token.
    if torch.compiler.is_exporting():
        added = [
            module(layer_idx, x_BTD) * weights_BTM[..., m, None] for m, module in enumerate(modules)
        ]
        return y_BTD + torch.stack(added).sum(0).to(y_BTD.dtype)
    weights_NM = weights_BTM.flatten(0, 1)
    x_ND = x_BTD.flatten(0, 1)
    y_ND = y_BTD.flatten(0, 1)
    for m, fires in enumerate((weights_NM > 0).any(dim=0).tolist()):
        if fires:
            rows = weights_NM[:, m].nonzero().squeeze(1)
            added = modules[m](layer_idx, x_ND[rows]) * weights_NM[rows, m, None]
            y_ND = y_ND.index_add(0, rows, added.to(y_ND.dtype))
    return y_ND.view_as(y_BTD)


def _bank(modules: tuple[ExpertModule, ...], layer: int, max_experts: int) -> GateBank:
    gates, moments = zip(
        *((module.gates[layer], module.moments[layer]) for module in modules), strict=True
    )
    device = modules[0].at(layer).down_proj.device
    half_lives = [module.settings.half_life for module in modules]
    return GateBank.stack(gates, moments, half_lives, max_experts, device)
