"""What is plugged and armed at one moment: a value, replaced as a whole when something changes."""

from dataclasses import dataclass, field

from deepseek.errors import PackError
from deepseek.model.experts.armed import Roster
from deepseek.model.experts.module import ExpertModule
from deepseek.packs.manifest import Manifest
from deepseek.registry import nearest

AUTO = "auto"

ROSTERS = 64
"""Choices of experts that are remembered at once."""


@dataclass(frozen=True)
class Plugged:
    """A plugged module and its papers."""

    module: ExpertModule
    manifest: Manifest


@dataclass(frozen=True)
class ExpertInfo:
    """What `list()` and `plug()` tell about a plugged module."""

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
    """Everything that plugging and arming change, replaced as a whole so that a reader sees all of
    it or nothing.

    plugged: sorted by content digest. arming: names, or "auto" for all that help. roster:
    candidates, None without any. rosters: those of sequences with a choice of their own, by their
    names and most experts a token, made when asked.
    """

    plugged: tuple[Plugged, ...] = ()
    arming: tuple[str, ...] | str = AUTO
    roster: Roster | None = None
    rosters: dict[tuple[tuple[str, ...], int], Roster] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(one.manifest.name for one in self.plugged))

    def arms(self, name: str) -> bool:
        """Whether the module `name` is a candidate; one that was measured to help nothing must be
        named.
        """
        return self.require(name).manifest.helps if self.arming == AUTO else name in self.arming

    def require(self, name: str) -> Plugged:
        """Return the module `name`; raise `PackError` if it is not plugged."""
        for one in self.plugged:
            if one.manifest.name == name:
                return one
        known = nearest(name, self.names) if self.plugged else "none is plugged"
        raise PackError(f"No expert named {name!r} is plugged; {known}.")


def roster_of(state: PlugState, names: tuple[str, ...], max_experts: int) -> Roster | None:
    """Return the roster of the modules `names`, sorted, which is made once; None without any."""
    if not names:
        return None
    roster = state.rosters.get((names, max_experts))
    if roster is None:
        if len(state.rosters) >= ROSTERS:
            state.rosters.clear()
        modules = tuple(one.module for one in state.plugged if one.module.name in names)
        roster = Roster(modules, max_experts)
        state.rosters[names, max_experts] = roster
    return roster
