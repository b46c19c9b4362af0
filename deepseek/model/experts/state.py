"""The state of plugging and arming: an immutable value that every change replaces as a whole."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from deepseek import checks
from deepseek.errors import PackError, shown
from deepseek.model.experts.adapter import AdapterModule
from deepseek.model.experts.armed import Roster
from deepseek.model.experts.arming import EVERY_EXPERT, Arming
from deepseek.model.experts.module import ExpertModule
from deepseek.packs.kinds import AnyManifest
from deepseek.registry import nearest

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
        num_bytes: memory of the weights.
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

    Attributes:
        plugged: the plugged modules, sorted by content digest.
        arming: which of them are armed, and with what weight.
        roster: the armed modules; None: no module is armed.
        rosters: cache of rosters for sequences that choose their own modules, by names and maximum
            number of experts per token.
    """

    plugged: tuple[Plugged, ...] = ()
    arming: Arming = EVERY_EXPERT
    roster: Roster | None = None
    rosters: dict[tuple[tuple[str, ...], int], Roster] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(expert.manifest.name for expert in self.plugged))

    def weights(self, arming: Arming | None = None) -> dict[str, float]:
        """Return the weight of each armed module, sorted by name.

        "auto" does not arm a module that was measured to be no better than the base, nor an adapter
        that was not imported for it.

        Args:
            arming: which modules are armed; None: the state's own.
        """
        arming = self.arming if arming is None else arming
        weights: dict[str, float] = {}
        for expert in sorted(self.plugged, key=lambda expert: expert.manifest.name):
            weight = arming.weight(expert.manifest.name, expert.manifest.helps)
            if weight is not None:
                weights[expert.manifest.name] = weight
        return weights

    def require(self, name: str) -> Plugged:
        """Return the module `name`; raise `PackError` if it is not plugged."""
        checks.text("name", name)
        for expert in self.plugged:
            if expert.manifest.name == name:
                return expert
        hint = nearest(name, self.names) if self.plugged else "none is plugged"
        raise PackError(f"No expert named {shown(name)} is plugged; {hint}.")


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
        chosen = [expert.module for expert in state.plugged if expert.module.name in names]
        roster = roster_with(chosen, max_experts)
        state.rosters[names, max_experts] = roster
    return roster


def roster_with(chosen: Iterable[ExpertModule | AdapterModule], max_experts: int | None) -> Roster:
    """Return a roster of these modules and adapters (see `Roster`)."""
    members = tuple(chosen)
    return Roster(
        tuple(module for module in members if isinstance(module, ExpertModule)),
        max_experts,
        tuple(module for module in members if isinstance(module, AdapterModule)),
    )
