"""The armed experts of one sequence: evaluate their gates and add their outputs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from deepseek import checks
from deepseek.errors import ConfigError
from deepseek.model.context import GateContext
from deepseek.model.experts.adapter import AdapterModule
from deepseek.model.experts.gate import GateBank
from deepseek.model.experts.module import ExpertModule
from deepseek.model.experts.relevance import RULED_OUT, RelevanceBank
from deepseek.model.experts.trace import Trace

CANDIDATES = 64
"""Maximum number of modules whose gates are evaluated because their relevance tables admit them."""


@dataclass(frozen=True)
class Roster:
    """The candidate modules and their gates, by layer.

    Modules are sorted by content digest, not by plug order, so that outputs are bit-identical for
    every plug order.

    Attributes:
        modules: all candidates.
        max_experts: maximum number of modules that fire at one token; None: no gates, every module
            fires at every token with weight 1.
        adapters: the adapters, which have no gate and act at every token, sorted by content digest.
    """

    modules: tuple[ExpertModule, ...]
    max_experts: int | None
    adapters: tuple[AdapterModule, ...] = ()

    @cached_property
    def members(self) -> tuple[ExpertModule | AdapterModule, ...]:
        """All candidates, the adapters last."""
        return (*self.modules, *self.adapters)

    @property
    def stored(self) -> tuple[ExpertModule, ...]:
        """The modules whose weights stay in their files until they are needed."""
        return tuple(module for module in self.modules if module.stored is not None)

    @cached_property
    def owners(self) -> dict[int, tuple[ExpertModule, ...]]:
        """Layer -> the candidates that have an expert layer there, in the same order."""
        layers = sorted({layer for module in self.modules for layer in module.layers})
        return {
            layer: tuple(module for module in self.modules if layer in module.layers)
            for layer in layers
        }

    @property
    def state_bytes(self) -> int:
        """Bytes of the gates' running sums of one sequence: three fp32 numbers a gate."""
        return sum(12 * len(owners) for owners in self.owners.values())

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
        if self.max_experts is None or not self.modules:
            return None
        return RelevanceBank.stack(self.modules, self.modules[0].device)

    def admitted(self, user_ids: Sequence[int] | None, document: Sequence[int] | None) -> list[str]:
        """Return the names of the modules that a conversation or a document admits, those with the
        most evidence first.

        A conversation admits a module above its relevance threshold; a document admits every module
        that it does not rule out, but at most `CANDIDATES` by their tables. Adapters, and modules
        without a table, have no relevance test, so they are always admitted, and come first.

        Args:
            user_ids: token ids of the user's messages in a conversation; None: a document.
            document: token ids of a text to continue; read without `user_ids` only.
        """
        bank = self.relevance
        if bank is None:
            return [member.name for member in self.members]
        untested = [adapter.name for adapter in self.adapters]
        untested += [module.name for module in self.modules if module.relevance is None]
        ids = document if user_ids is None else user_ids
        tokens = checks.token_ids("ids", ids or ())
        ids_BT = torch.tensor([tokens], dtype=torch.long, device=bank.offset_M.device)
        above_M = (
            bank.whole_document(ids_BT)[0] - RULED_OUT
            if user_ids is None
            else bank.above_threshold(ids_BT)[0]
        )
        ranked = above_M.argsort(descending=True, stable=True).tolist()
        above = above_M.tolist()
        tested = [
            self.modules[index].name
            for index in ranked
            if above[index] > 0 and self.modules[index].relevance is not None
        ]
        return untested + tested[:CANDIDATES]

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
        weights: name -> factor on what the module or adapter adds; those that are not named have
            factor 1.
    """

    def __init__(
        self,
        roster: Roster,
        traces: Sequence[Trace] = (),
        decided_BM: Tensor | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self._roster = roster
        self._banks = roster.banks  # built here, in the caller's thread, not in the engine's
        self._traces = traces
        self._decided_BM = decided_BM
        # Factor 1 is left out, so that it takes the same path as no factor.
        self.factors: dict[str, float] = {
            module.name: float(weights[module.name])
            for module in roster.members
            if weights and weights.get(module.name, 1.0) != 1.0
        }
        self._weights: dict[int, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, object]) -> "ArmedExperts":
        # A copied cache continues with the same experts and must not copy their weights.
        return self._with(self._decided_BM)

    def with_rows(self, change: Callable[[Tensor], Tensor]) -> "ArmedExperts":
        """Return the experts for a cache whose rows are selected or reordered by `change`."""
        if self._decided_BM is None or len(self._decided_BM) == 1:
            return self
        return self._with(change(self._decided_BM))

    def _with(self, decided_BM: Tensor | None) -> "ArmedExperts":
        return ArmedExperts(self._roster, self._traces, decided_BM, self.factors)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the candidates with a gate, in canonical order."""
        return tuple(module.name for module in self._roster.modules)

    @property
    def roster(self) -> Roster:
        """The candidates, layer by layer."""
        return self._roster

    @property
    def adapts(self) -> bool:
        """Whether an adapter is armed."""
        return bool(self._roster.adapters)

    @property
    def strongest_adapter(self) -> str | None:
        """Name of the adapter with the largest factor; None: no adapter is armed."""
        names = [adapter.name for adapter in self._roster.adapters]
        return max(names, key=lambda name: self.factors.get(name, 1.0), default=None)

    @property
    def identity(self) -> str | None:
        """Cache key that identifies this set of experts: `max_experts`, the content digests of
        modules and adapters, and their factors.

        None if the set has no unique key because a module is forced or was created in memory.
        """
        return self.identity_below(None)

    def identity_below(self, cut: int | None) -> str | None:
        """Return the cache key of the experts that act below the feed-forward network of a layer.

        Args:
            cut: the layer; None: all layers. An adapter changes attention too, and counts for every
                layer.

        Returns:
            The key; "" if none acts there, None if one of those that do has no unique key.
        """
        members = [
            member
            for member in self._roster.members
            if cut is None or not isinstance(member, ExpertModule) or member.layers[0] < cut
        ]
        if not members:
            return ""
        digests = [module.digest for module in members]
        if self._banks is None or not all(digests):
            return None
        factors = [self.factors.get(module.name, 1.0) for module in members]
        # Without factors the key is that of the set alone.
        weighted = any(factor != 1.0 for factor in factors)
        return f"[{self._roster.max_experts}] {digests} {factors if weighted else ''}"

    def adapt(self, site: str, x: Tensor, y: Tensor) -> Tensor:
        """Return the output `y` of a linear layer plus the changes of the armed adapters.

        Args:
            site: name of the layer.
            x: input of the layer, `[..., D]`.
            y: output of the layer, `[..., F]`.
        """
        for adapter in self._roster.adapters:
            delta = adapter.change(site, x, self.factors.get(adapter.name, 1.0))
            if delta is not None:
                y = y + delta.to(y.dtype)
        return y

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
        weights_BTM = self.weights(layer_idx, x_BTD, ctx)
        if self._banks is None:
            for module in modules:
                y_BTD = y_BTD + module(layer_idx, x_BTD).to(y_BTD.dtype)
        else:
            y_BTD = combine(modules, layer_idx, x_BTD, y_BTD, weights_BTM)
        self._weights[layer_idx] = weights_BTM
        return y_BTD

    def weights(self, layer_idx: int, x_BTD: Tensor, ctx: GateContext) -> Tensor:
        """Return the weights `[B, T, M]` of the modules at a layer, and update the running sums in
        `ctx.cache`.

        Args:
            layer_idx: index of a layer that has at least one module.
            x_BTD: gate input, the normed hidden states.
            ctx: context of the forward pass.
        """
        modules = self._roster.owners[layer_idx]
        if self._banks is None:
            weights_BTM = x_BTD.new_ones(*x_BTD.shape[:2], len(modules), dtype=torch.float32)
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
            if self.factors:
                weights_BTM = weights_BTM * weights_BTM.new_tensor(self._factors_of(modules))
        for trace in tuple(self._traces):  # copied: another thread's block may end meanwhile
            trace.add(modules, layer_idx, weights_BTM)
        return weights_BTM

    def _factors_of(self, modules: Sequence[ExpertModule]) -> list[float]:
        return [self.factors.get(module.name, 1.0) for module in modules]

    def _words(self, ctx: GateContext) -> Tensor | None:
        """Return the accumulated relevance evidence `[B, T, M]` of a document, in nats.

        None if relevance plays no part: admission is already decided, no candidate has a table, or
        the pass runs on embeddings.
        """
        if self._decided_BM is not None or ctx.input_ids_BT is None:
            return None  # before `relevance` builds the bank, which copies the experts' tables
        bank = self._roster.relevance
        if bank is None:
            return None
        if ctx.words_BTM is None:
            state = ctx.cache.relevance_state if ctx.cache is not None else None
            sums_BTM, state = bank.accumulate(
                ctx.input_ids_BT, state, ctx.token_mask_BT, ctx.document_ids_BT
            )
            if ctx.cache is not None:
                ctx.cache.relevance_state = state
            ctx.words_BTM = bank.of_document(sums_BTM)
        return ctx.words_BTM

    def attribution(self) -> Tensor:
        """Return the weights `[B, T, M]` of the latest forward pass, averaged over layers.

        M is in the order of `names`. Layers that have not run are left out of the average.

        Raises:
            ConfigError: no layer with an expert has run.
        """
        if not self._weights:
            raise ConfigError(
                "No layer of an armed expert has run, so there are no weights; run the model from "
                "a layer at or below that of an armed expert."
            )
        return attribution(self._roster, self._weights)


def attribution(roster: Roster, weights: Mapping[int, Tensor]) -> Tensor:
    """Return the weights `[B, T, M]` of the modules of a roster, averaged over layers.

    A module has weight 0 if none of its layers has run, as when a pass resumes above them.

    Args:
        roster: the modules.
        weights: layer -> the weights `[B, T, M]` of its owners, for one layer or more.
    """
    trace = Trace()
    for layer, weights_BTM in weights.items():
        trace.add(roster.owners[layer], layer, weights_BTM)
    zeros_BT = torch.zeros(next(iter(weights.values())).shape[:2], device="cpu")  # as in the trace
    return torch.stack(
        [
            trace.weights(module.name) if module.name in trace.names else zeros_BT
            for module in roster.modules
        ],
        dim=-1,
    )


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
    half_lives = [module.settings.half_life for module in modules]
    return GateBank.stack(gates, moments, half_lives, max_experts, modules[0].device)
