"""The state of plugging and arming: an immutable value that every change replaces as a whole."""

from dataclasses import dataclass, field

from deepseek.errors import PackError
from deepseek.model.experts.armed import Roster
from deepseek.model.experts.module import ExpertModule
from deepseek.packs.manifest import Manifest
from deepseek.registry import nearest

AUTO = "auto"

ROSTERS = 64
"""Maximum number of cached rosters."""


@dataclass(frozen=True)
class Plugged:
    """A plugged module and its manifest."""

    module: ExpertModule
    manifest: Manifest


@dataclass(frozen=True)
class ExpertInfo:
    """Details of a plugged module, as `list()` and `plug()` return them.

    Attributes:
        name: name of the expert.
        domain: short description of its domain.
        layers: base layers that have an expert layer.
        width: width F of the expert layers.
        licence: SPDX expression.
        digest: content digest of the pack.
        signer: public key of the signer in hexadecimal; None: not signed.
        num_bytes: memory of the weights.
        armed: whether the expert is armed.
        verdict: held-out result in words, such as "better by 3.1 %".
    """

    name: str
    domain: str
    layers: tuple[int, ...]
    width: int
    licence: str
    digest: str
    signer: str | None
    num_bytes: int
    armed: bool
    verdict: str


@dataclass(frozen=True)
class PlugState:
    """Everything that plugging and arming change.

    The state is replaced as a whole, so that readers without the lock always see a consistent one.

    Attributes:
        plugged: the plugged modules, sorted by content digest.
        arming: names of the armed modules, or "auto" for all that are better than the base.
        roster: the armed modules; None: no module is armed.
        rosters: cache of rosters for sequences that choose their own modules, by names and maximum
            number of experts per token.
    """

    plugged: tuple[Plugged, ...] = ()
    arming: tuple[str, ...] | str = AUTO
    roster: Roster | None = None
    rosters: dict[tuple[tuple[str, ...], int], Roster] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(expert.manifest.name for expert in self.plugged))

    def arms(self, name: str) -> bool:
        """Return whether the module `name` is armed.

        "auto" does not arm a module that was measured to be no better than the base.
        """
        return self.require(name).manifest.helps if self.arming == AUTO else name in self.arming

    def require(self, name: str) -> Plugged:
        """Return the module `name`; raise `PackError` if it is not plugged."""
        for expert in self.plugged:
            if expert.manifest.name == name:
                return expert
        hint = nearest(name, self.names) if self.plugged else "none is plugged"
        raise PackError(f"No expert named {name!r} is plugged; {hint}.")


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
        modules = tuple(expert.module for expert in state.plugged if expert.module.name in names)
        roster = Roster(modules, max_experts)
        state.rosters[names, max_experts] = roster
    return roster
