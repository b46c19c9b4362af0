"""Many replicas, one set of experts: a change counts once every replica has confirmed it, and else
it is taken back.

request -> one replica's fleet -> ledger -> the new state to every replica -> reports -> kept, or
the old state again

The ledger is the only place where the state changes. Replicas fetch it there, each bring their
engine to it and report; one that starts does so before it serves. Nothing here knows what carries
the calls.
"""

import asyncio
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from deepseek.engine.engine import Engine
from deepseek.errors import PackError
from deepseek.model.experts import ExpertInfo
from deepseek.packs.pack import ExpertPack, read_pack
from deepseek.server.errors import ApiError, as_api_error

LOOK_SECONDS = 1.0
"""How long a report may be awaited before somebody looks whether its replica still lives."""

LOOKS = 60
"""After which a replica that lives and does not report is struck off."""

SILENT = "it does not answer"


@dataclass(frozen=True)
class State:
    """What every replica must hold.

    Attributes:
        experts: name -> content digest of what is plugged.
        arming: see `ExpertSet.arm`.
        draining: whether no more requests are taken.
    """

    experts: dict[str, str] = field(default_factory=dict)
    arming: str | tuple[str, ...] = "auto"
    draining: bool = False


@dataclass(frozen=True)
class Report:
    """How a replica is.

    Attributes:
        experts: what it holds. refusal: why it does not hold what it should, "" if it does.
        active: requests under way. metrics: its figures in Prometheus' text form.
    """

    experts: dict[str, str]
    refusal: str = ""
    active: int = 0
    metrics: str = ""

    def mismatch(self, state: State) -> str:
        """Return why this does not confirm that a replica holds `state`, "" if it does."""
        return self.refusal or ("" if self.experts == state.experts else "its digests differ")


class Member:
    """A replica as the ledger sees it. `actor`: its Ray actor, which can be asked whether it
    lives.
    """

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.states: asyncio.Queue[State | None] = asyncio.Queue()
        self.reports: asyncio.Queue[Report] = asyncio.Queue()

    async def hold(self, state: State) -> Report:
        """Return what the replica reports on a state."""
        self.states.put_nowait(state)
        for _ in range(LOOKS):
            with suppress(TimeoutError):
                return await asyncio.wait_for(self.reports.get(), LOOK_SECONDS)
            try:
                await asyncio.wait_for(self.actor.__ray_ready__.remote(), LOOK_SECONDS)
            except TimeoutError:
                pass  # it may be busy
            except Exception:  # Ray has several for an actor that has ended
                break
        return Report({}, SILENT)


class Ledger:
    """What all replicas hold, and who they are. One task at a time changes it.

    Args:
        packs: what is plugged from the start.
    """

    def __init__(self, packs: Sequence[ExpertPack] = ()) -> None:
        self._packs = {pack.manifest.digest: pack for pack in packs}
        self._state = State({pack.manifest.name: pack.manifest.digest for pack in packs})
        self._members: dict[str, Member] = {}
        self._changing = asyncio.Lock()

    async def join(self, name: str, actor: Any) -> State:
        """Count in a replica that starts; return what it must hold before it serves."""
        async with self._changing:
            self._members[name] = Member(actor)
            return self._state

    async def fetch(self, name: str, report: Report | None) -> State | None:
        """Take a replica's latest report and return the next state to hold, when there is one.

        None tells a replica that it was struck off and must end.
        """
        member = self._members.get(name)
        if member is not None and report is not None:
            member.reports.put_nowait(report)
        return None if member is None else await member.states.get()

    async def pack(self, digest: str) -> ExpertPack:
        """Return what to plug for a digest."""
        return self._packs[digest]

    async def change(
        self, before: State, after: State, pack: ExpertPack | None = None
    ) -> dict[str, str]:
        """Let every replica hold `after`, for which `pack` may be needed; unless all confirm, all
        hold `before` again.

        Returns why it is not confirmed, by replica, "" for those that do confirm.
        """
        async with self._changing:
            if before != self._state:
                return {"": "", "another": "it had a change of its own"}
            if pack is not None:
                self._packs[pack.manifest.digest] = pack
            found = {
                name: report.mismatch(after) for name, report in (await self._tell(after)).items()
            }
            self._state = before if any(found.values()) else after
            for name, report in (await self._tell(before)).items() if self._state is before else ():
                if report.mismatch(before):
                    self._strike(name)  # it cannot go back
            self._packs = {digest: self._packs[digest] for digest in self._state.experts.values()}
            return found

    async def reports(self, draining: bool = False) -> dict[str, Report]:
        """Return how every replica is; with `draining`, once it takes no more requests."""
        async with self._changing:
            self._state = replace(self._state, draining=draining or self._state.draining)
            return await self._tell(self._state)

    async def _tell(self, state: State) -> dict[str, Report]:
        """Return what the replicas report on a state, and strike off those that are silent."""
        members = dict(self._members)
        reports = await asyncio.gather(*(member.hold(state) for member in members.values()))
        for name, report in zip(members, reports, strict=True):
            if report.refusal == SILENT:
                self._strike(name)
        return dict(zip(members, reports, strict=True))

    def _strike(self, name: str) -> None:
        """Strike a replica off, which ends it; where it ran, Ray starts another one."""
        if name in self._members:
            self._members.pop(name).states.put_nowait(None)


class Fleet:
    """The replicas of one server as one of them sees them: it plugs as an engine does, but
    everywhere.

    Args:
        engine: this replica's own.
        call: calls a method of the ledger, wherever that is, and waits for what it returns.
        take: is told whether the server drains; returns the requests under way and the figures of
            this replica.
        lost: called from another thread when this replica no longer knows what the others have; it
            must end then.
    """

    def __init__(
        self,
        engine: Engine,
        call: Callable[..., Any],
        take: Callable[[bool], tuple[int, str]],
        lost: Callable[[], object],
    ) -> None:
        self._engine = engine
        self._call = call
        self._take = take
        self._lost = lost
        self._state = State()

    def join(self, name: str, actor: Any) -> None:
        """Plug and arm what the others have, and follow the ledger from then on. Raises
        `PackError`.
        """
        state = self._call("join", name, actor)
        if refusal := self._hold(state).mismatch(state):
            raise PackError(refusal)
        threading.Thread(target=self._follow, args=(name,), name="follow", daemon=True).start()

    def plug(self, path: str | Path) -> ExpertInfo:
        """Plug a pack file everywhere. Raises `PackError` as an engine does, `ApiError` if not all
        could.
        """
        pack = read_pack(path)
        state = self._state
        name = pack.manifest.name
        digest = pack.manifest.digest
        if name in state.experts:
            raise PackError(f"An expert named {name} is plugged already; unplug it first.")
        self._change(state, replace(state, experts={**state.experts, name: digest}), pack)
        return next(info for info in self._engine.experts() if info.name == name)

    def unplug(self, name: str) -> None:
        """Unplug an expert everywhere. Raises as `plug`."""
        state = self._state
        rest = {other: digest for other, digest in state.experts.items() if other != name}
        arming = (
            state.arming
            if isinstance(state.arming, str)
            else tuple(one for one in state.arming if one in rest)
        )
        self._change(state, replace(state, experts=rest, arming=arming))

    def arm(self, names: str | Iterable[str]) -> tuple[str, ...]:
        """Choose everywhere who speaks where a request does not choose; return their names. Raises
        as `plug`.
        """
        self._change(
            self._state,
            replace(self._state, arming=names if isinstance(names, str) else tuple(names)),
        )
        return tuple(info.name for info in self._engine.experts() if info.armed)

    def metrics(self) -> bytes:
        """Return the figures of all replicas in Prometheus' text form, each with a label that names
        its replica.
        """
        registry = CollectorRegistry(auto_describe=False)
        registry.register(
            Figures({name: report.metrics for name, report in self._call("reports").items()})
        )
        return generate_latest(registry)

    def _change(self, before: State, after: State, *pack: ExpertPack) -> None:
        found = self._call("change", before, after, *pack)
        if (reasons := set(found.values())) == {""}:
            return
        if len(reasons) == 1:
            raise PackError(reasons.pop())
        why = (
            "; ".join(f"{name}: {reason}" for name, reason in found.items() if reason)
            or "none is there"
        )
        message = f"Not all replicas confirmed, so nothing has changed ({why}); try again."
        raise ApiError(503, message, code="not_confirmed")

    def _follow(self, name: str) -> None:
        report = None
        try:
            while (state := self._call("fetch", name, report)) is not None:
                report = self._hold(state)
        finally:
            self._lost()

    def _hold(self, state: State) -> Report:
        """Bring the engine to a state and report."""
        engine = self._engine
        refusal = ""
        active, metrics = self._take(state.draining)
        try:
            held = {info.name: info.digest for info in engine.experts()}
            for name, _ in held.items() - state.experts.items():
                engine.unplug(name)
            for _, digest in state.experts.items() - held.items():
                engine.plug(self._call("pack", digest))
            if state.arming != self._state.arming:
                engine.arm(state.arming)
            self._state = state
        except Exception as error:  # the others must hear of it, whatever it is
            refusal = as_api_error(error).message
        return Report(
            {info.name: info.digest for info in engine.experts()}, refusal, active, metrics
        )


class Figures(Collector):
    """The figures of several replicas. `texts`: in Prometheus' form, by name of the replica."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        self.texts = texts

    def collect(self) -> Iterable[Metric]:
        """Return all of them, each with a label that names its replica."""
        families: dict[str, Metric] = {}
        for replica, text in self.texts.items():
            for family in text_string_to_metric_families(text):
                kept = families.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                for sample in family.samples:
                    kept.add_sample(
                        sample.name, {**sample.labels, "replica": replica}, sample.value
                    )
        return families.values()
