"""The state of plugging and arming: an immutable value that every change replaces as a whole."""

from bisect import insort
from collections.abc import Callable, Container, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from transformers import PreTrainedModel

from deepseek import checks
from deepseek.errors import ConfigError, PackError, shown
from deepseek.model.experts.adapter import AdapterModule
from deepseek.model.experts.armed import ArmedExperts, Roster
from deepseek.model.experts.arming import EVERY_EXPERT, Arming
from deepseek.model.experts.linear_hooks import HookTable
from deepseek.model.experts.module import ExpertModule
from deepseek.model.experts.weight_cache import WeightCache
from deepseek.packs.kinds import AnyManifest
from deepseek.packs.lora import LoraManifest
from deepseek.packs.manifest import Manifest
from deepseek.packs.pack import ExpertPack
from deepseek.registry import nearest

ExpertBytes = Callable[[ArmedExperts | None], Mapping[ExpertModule, int]]
"""Returns the bytes that a sequence needs for each of its experts whose weights are stored."""

ROSTERS = 64
"""Maximum number of cached rosters."""


@dataclass(frozen=True)
class Plugged:
    """A plugged module or adapter, and its manifest."""

    module: ExpertModule | AdapterModule
    manifest: AnyManifest


@dataclass(frozen=True)
class ExpertInfo:
    """Details of a plugged module, as `list()` and `plug()` return them.

    Attributes:
        name: name of the expert.
        kind: "expert" for a module with gates, "lora" for an adapter.
        domain: short description of its domain.
        layers: base layers that have an expert layer, or that an adapter changes.
        width: width F of the expert layers; highest rank of an adapter.
        licence: SPDX expression.
        digest: content digest of the pack.
        signer: public key of the signer in hexadecimal; None: not signed.
        num_bytes: memory of the weights in the model's dtype.
        armed: whether the expert is armed.
        weight: factor on what it adds where it is armed by default; 0: it is not armed.
        verdict: held-out result in words, such as "better by 3.1 %".
    """

    name: str
    kind: str
    domain: str
    layers: tuple[int, ...]
    width: int
    licence: str
    digest: str
    signer: str | None
    num_bytes: int
    armed: bool
    weight: float
    verdict: str


@dataclass(frozen=True)
class PlugState:
    """Everything that plugging and arming change.

    The state is replaced as a whole, so that readers without the lock always see a consistent one.
    Derived values are computed at first use, so that plugging one expert among a thousand costs as
    much as plugging the first.

    Attributes:
        plugged: the plugged modules, sorted by content digest.
        arming: which of them are armed, and with what weight.
        max_experts: maximum number of modules that fire at one token.
        rosters: cache of rosters for sequences that choose their own modules, by names and maximum
            number of experts per token.
    """

    plugged: tuple[Plugged, ...] = ()
    arming: Arming = EVERY_EXPERT
    max_experts: int = 5
    rosters: dict[tuple[tuple[str, ...], int], Roster] = field(default_factory=dict)

    @cached_property
    def by_name(self) -> dict[str, Plugged]:
        """The plugged modules by name, sorted."""
        named = {expert.manifest.name: expert for expert in self.plugged}
        return dict(sorted(named.items()))

    @cached_property
    def roster(self) -> Roster | None:
        """The armed modules; None: no module is armed."""
        return roster_of(self, tuple(self.armed_weights), self.max_experts)

    @cached_property
    def infos(self) -> tuple[ExpertInfo, ...]:
        """Details of the plugged modules, sorted by name."""
        return tuple(self.info(expert) for expert in self.by_name.values())

    @cached_property
    def first_layers(self) -> tuple[int, ...]:
        """The lowest layer of each plugged module; adapters are left out."""
        modules = (expert.module for expert in self.plugged)
        return tuple(module.layers[0] for module in modules if isinstance(module, ExpertModule))

    @cached_property
    def armed_weights(self) -> Mapping[str, float]:
        """Weight of each module that is armed by default, sorted by name."""
        return self._weights(self.arming)

    def weights(self, arming: Arming) -> Mapping[str, float]:
        """Return the weight of each module that a choice arms, sorted by name.

        "auto" does not arm a module that was measured to be no better than the base, nor an adapter
        that was not imported for it.
        """
        return self.armed_weights if arming == self.arming else self._weights(arming)

    def _weights(self, arming: Arming) -> Mapping[str, float]:
        weights: dict[str, float] = {}
        for name, expert in self.by_name.items():
            weight = arming.weight(name, expert.manifest.helps)
            if weight is not None:
                weights[name] = weight
        return weights

    def having(self, expert: Plugged) -> tuple[Plugged, ...]:
        """Return the plugged modules with one added, which replaces one of the same name, sorted by
        content digest.
        """
        plugged = list(self.without(expert.manifest.name))
        insort(plugged, expert, key=lambda other: other.manifest.digest)
        return tuple(plugged)

    def without(self, name: str) -> tuple[Plugged, ...]:
        """Return the plugged modules without the one of this name, if there is one."""
        return tuple(expert for expert in self.plugged if expert.manifest.name != name)

    @property
    def place(self) -> tuple[torch.device, torch.dtype] | None:
        """Device and dtype of the modules' weights; None: no module is plugged."""
        if not self.plugged:
            return None
        module = self.plugged[0].module
        return module.device, module.dtype

    def placed(self, device: torch.device, dtype: torch.dtype) -> tuple[Plugged, ...]:
        """Return the plugged modules with their weights on a device, in a dtype.

        They are copies, so that sequences in flight, and the original of a copied model, keep
        theirs.
        """
        with recordable():
            return tuple(
                replace(expert, module=expert.module.placed(device, dtype))
                for expert in self.plugged
            )

    def require(self, name: str) -> Plugged:
        """Return the module `name`; raise `PackError` if it is not plugged."""
        checks.text("name", name)
        if name in self.by_name:
            return self.by_name[name]
        hint = nearest(name, tuple(self.by_name)) if self.plugged else "none is plugged"
        raise PackError(f"No expert named {shown(name)} is plugged; {hint}.")

    def info(self, expert: Plugged) -> ExpertInfo:
        """Return the details of a plugged module."""
        manifest = expert.manifest
        weight = self.arming.weight(manifest.name, manifest.helps) or 0.0
        return ExpertInfo(
            name=manifest.name,
            kind="expert" if isinstance(manifest, Manifest) else manifest.kind,
            domain=manifest.domain,
            layers=manifest.layers,
            width=manifest.width if isinstance(manifest, Manifest) else manifest.rank,
            licence=manifest.licence,
            digest=manifest.digest,
            signer=manifest.signature.public_key if manifest.signature else None,
            num_bytes=expert.module.nbytes,
            armed=weight > 0,
            weight=weight,
            verdict=manifest.verdict,
        )


def recordable() -> AbstractContextManager[None]:
    """Return a context for creating weights through which later passes can record gradients, even
    if the caller is in `torch.inference_mode`.
    """
    return torch.inference_mode(False)


def module_from(
    pack: ExpertPack, model: PreTrainedModel, hooks: HookTable
) -> ExpertModule | AdapterModule:
    """Return the module or adapter of a checked pack, in a model's dtype and on its device.

    Args:
        pack: a pack that passed `check_pack` or `read_pack`.
        model: the model.
        hooks: the hooks on the model's linear layers, for an adapter.

    Raises:
        PackError: the pack does not fit the model.
    """
    with recordable():
        if isinstance(pack.manifest, LoraManifest):
            return AdapterModule.from_pack(pack, model, hooks, model.dtype, model.device)
        return ExpertModule.from_pack(pack, model.dtype, model.device)


def roster_of(state: PlugState, names: tuple[str, ...], max_experts: int) -> Roster | None:
    """Return the roster of some plugged modules from the cache, creating it at the first call.

    Args:
        state: the plugged modules, and the cache of rosters.
        names: names of the modules, sorted; without names, the result is None.
        max_experts: maximum number of modules that fire at one token.
    """
    if not names:
        return None
    roster = state.rosters.get((names, max_experts))
    if roster is None:
        if len(state.rosters) >= ROSTERS:
            state.rosters.clear()
        roster = roster_with((state.by_name[name].module for name in names), max_experts)
        state.rosters[names, max_experts] = roster
    return roster


def fitting(
    state: PlugState,
    names: tuple[str, ...],
    needed: Container[str],
    expert_bytes: ExpertBytes,
    weight_cache: WeightCache,
) -> tuple[str, ...]:
    """Return the names of the modules whose weights fit into the budget together.

    Args:
        state: the plugged modules.
        names: names of the modules, in the order of preference.
        needed: names of those that are returned in any case.
        expert_bytes: returns the memory of a sequence's experts.
        weight_cache: has the budget.
    """
    if weight_cache.limit is None:
        return names
    modules = (state.by_name[name].module for name in names)
    armed = ArmedExperts(roster_with(modules, None))  # None: do not build the gates
    sizes = {module.name: nbytes for module, nbytes in expert_bytes(armed).items()}
    return weight_cache.fitting(names, needed, sizes)


def chosen_module(
    state: PlugState, module: str | ExpertModule | AdapterModule
) -> ExpertModule | AdapterModule:
    """Return a module itself, or the plugged one of that name.

    Raises:
        ConfigError: it is neither a module nor a name.
        PackError: no module of that name is plugged.
    """
    if isinstance(module, str):
        return state.require(module).module
    if not isinstance(module, ExpertModule | AdapterModule):
        raise ConfigError(f"module={shown(module)} must be a module or the name of a plugged one.")
    return module


def roster_with(chosen: Iterable[ExpertModule | AdapterModule], max_experts: int | None) -> Roster:
    """Return a roster of these modules and adapters (see `Roster`)."""
    members = sorted(chosen, key=lambda member: member.digest)
    return Roster(
        tuple(module for module in members if isinstance(module, ExpertModule)),
        max_experts,
        tuple(module for module in members if isinstance(module, AdapterModule)),
    )
