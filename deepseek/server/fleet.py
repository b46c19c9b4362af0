"""Keep one set of experts on many replicas: a change is committed once every replica has confirmed
it, and rolled back otherwise.

A change passes these steps: request -> one replica's fleet -> ledger -> new state to every replica
-> reports -> commit, or roll back to the old state.

The ledger is the only place where the state changes. Replicas fetch the state from it, apply it to
their engine and report; a starting replica does so before it serves. This module does not depend on
the transport of the calls (Ray, in `replicas.py`).
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
from deepseek.model.experts.arming import EVERY_EXPERT, Arming, ArmingValue
from deepseek.packs.pack import ExpertPack, read_pack
from deepseek.server.errors import ApiError, as_api_error

LOOK_SECONDS = 1.0
"""Seconds to wait for a report before each check that its replica is alive."""

LOOKS = 60
"""Number of such checks after which a replica that is alive but does not report is removed."""

SILENT = "it does not answer"


@dataclass(frozen=True)
class State:
    """The state that every replica must have.

    Attributes:
        experts: name -> content digest of the plugged experts.
        arming: the experts that are armed by default.
        draining: whether new requests are refused.
    """

    experts: dict[str, str] = field(default_factory=dict)
    arming: Arming = EVERY_EXPERT
    draining: bool = False


@dataclass(frozen=True)
class Report:
    """The status of a replica.

    Attributes:
        experts: name -> content digest of its plugged experts.
        refusal: why it could not apply the state; "" if it could.
        active: number of running requests.
        metrics: its metrics in Prometheus' text format.
    """

    experts: dict[str, str]
    refusal: str = ""
    active: int = 0
    metrics: str = ""

    def mismatch(self, state: State) -> str:
        """Return why this report does not confirm `state`, "" if it does."""
        return self.refusal or ("" if self.experts == state.experts else "its digests differ")


class Member:
    """A replica as seen by the ledger.

    Args:
        actor: its Ray actor, used to check that it is alive.
    """

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.states: asyncio.Queue[State | None] = asyncio.Queue()
        self.reports: asyncio.Queue[Report] = asyncio.Queue()

    async def hold(self, state: State) -> Report:
        """Send a state to the replica and return its report, or a silent one if it does not
        answer.
        """
        self.states.put_nowait(state)
        for _ in range(LOOKS):
            with suppress(TimeoutError):
                return await asyncio.wait_for(self.reports.get(), LOOK_SECONDS)
            try:
                await asyncio.wait_for(self.actor.__ray_ready__.remote(), LOOK_SECONDS)
            except TimeoutError:
                pass  # possibly busy
            except Exception:  # Ray has several exceptions for a dead actor
                break
        return Report({}, SILENT)


class Ledger:
    """The shared state of all replicas, and the list of replicas; a lock serialises changes.

    Args:
        packs: packs plugged at start; default: none.
        arming: which of them are armed; default: "auto".
    """

    def __init__(self, packs: Sequence[ExpertPack] = (), arming: Arming = EVERY_EXPERT) -> None:
        self._packs = {pack.manifest.digest: pack for pack in packs}
        digests = {pack.manifest.name: pack.manifest.digest for pack in packs}
        self._state = State(digests, arming)
        self._members: dict[str, Member] = {}
        self._changing = asyncio.Lock()

    async def join(self, name: str, actor: Any) -> State:
        """Add a starting replica; return the state that it must have before it serves.

        Args:
            name: unique name of the replica.
            actor: its Ray actor.
        """
        async with self._changing:
            self._members[name] = Member(actor)
            return self._state

    async def fetch(self, name: str, report: Report | None) -> State | None:
        """Take a replica's latest report, wait for the next state and return it.

        None means that the replica was removed and must exit.
        """
        member = self._members.get(name)
        if member is not None and report is not None:
            member.reports.put_nowait(report)
        return None if member is None else await member.states.get()

    async def pack(self, digest: str) -> ExpertPack:
        """Return the pack with this content digest."""
        return self._packs[digest]

    async def change(
        self, before: State, after: State, pack: ExpertPack | None = None
    ) -> dict[str, str]:
        """Move every replica from `before` to `after`; unless all confirm, roll back to `before`.

        Args:
            before: the state from which the change was computed.
            after: the new state.
            pack: the pack that `after` adds; default: none.

        Returns:
            By replica, why it did not confirm; "" for those that did.
        """
        async with self._changing:
            if before != self._state:
                return {"": "", "another": "it had a change of its own"}
            if pack is not None:
                self._packs[pack.manifest.digest] = pack
            reports = await self._broadcast(after)
            reasons = {name: report.mismatch(after) for name, report in reports.items()}
            self._state = before if any(reasons.values()) else after
            rollback = await self._broadcast(before) if self._state is before else {}
            for name, report in rollback.items():
                if report.mismatch(before):
                    self._strike(name)  # it failed to roll back
            self._packs = {digest: self._packs[digest] for digest in self._state.experts.values()}
            return reasons

    async def reports(self, draining: bool = False) -> dict[str, Report]:
        """Return the reports of all replicas.

        Args:
            draining: make all replicas refuse new requests first; default: False.
        """
        async with self._changing:
            self._state = replace(self._state, draining=draining or self._state.draining)
            return await self._broadcast(self._state)

    async def _broadcast(self, state: State) -> dict[str, Report]:
        """Send a state to all replicas, remove those that do not answer, and return the reports."""
        members = dict(self._members)
        reports = await asyncio.gather(*(member.hold(state) for member in members.values()))
        for name, report in zip(members, reports, strict=True):
            if report.refusal == SILENT:
                self._strike(name)
        return dict(zip(members, reports, strict=True))

    def _strike(self, name: str) -> None:
        """Remove a replica, which makes it exit; Ray starts another one in its place."""
        if name in self._members:
            self._members.pop(name).states.put_nowait(None)


class Fleet:
    """All replicas as seen by one of them: plugs, unplugs and arms like an engine, but everywhere.

    Args:
        engine: the engine of this replica.
        call: calls a method of the ledger and returns its result.
        take: receives whether the server drains; returns the number of running requests and the
            metrics of this replica.
        lost: called from another thread when this replica has lost the ledger and must exit.
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
        """Apply the shared state to this replica, then follow the ledger in a thread.

        Args:
            name: unique name of this replica.
            actor: its Ray actor.

        Raises:
            PackError: the state cannot be applied here.
        """
        state = self._call("join", name, actor)
        if refusal := self._hold(state).mismatch(state):
            raise PackError(refusal)
        threading.Thread(target=self._follow, args=(name,), name="follow", daemon=True).start()

    def plug(self, path: str | Path, *, in_place: bool = False) -> ExpertInfo:
        """Plug a pack file in all replicas and return its description.

        Args:
            path: the pack file.
            in_place: whether it replaces the plugged expert of its name, if there is one, and is
                armed as that was.

        Raises:
            PackError: as `Engine.plug`.
            ApiError: not all replicas confirmed (503); nothing has changed.
        """
        pack = read_pack(path)
        state = self._state
        name = pack.manifest.name
        digest = pack.manifest.digest
        if name in state.experts and not in_place:
            raise PackError(f"An expert named {name} is plugged already; unplug it first.")
        self._change(state, replace(state, experts={**state.experts, name: digest}), pack)
        return next(info for info in self._engine.experts() if info.name == name)

    def unplug(self, name: str) -> None:
        """Unplug an expert in all replicas. Raises as `plug`."""
        state = self._state
        rest = {other: digest for other, digest in state.experts.items() if other != name}
        self._change(state, replace(state, experts=rest, arming=state.arming.among(rest)))

    def arm(self, names: ArmingValue) -> tuple[str, ...]:
        """Set the experts armed by default in all replicas; return their names.

        Args:
            names: names of experts, names with weights, or "auto" (see `ExpertSet.arm`).

        Raises as `plug`.
        """
        self._change(self._state, replace(self._state, arming=Arming.parse(names)))
        return tuple(info.name for info in self._engine.experts() if info.armed)

    def metrics(self) -> bytes:
        """Return the metrics of all replicas in Prometheus' text format, labelled by replica."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(
            Figures({name: report.metrics for name, report in self._call("reports").items()})
        )
        return generate_latest(registry)

    def _change(self, before: State, after: State, *pack: ExpertPack) -> None:
        results = self._call("change", before, after, *pack)
        if (reasons := set(results.values())) == {""}:
            return
        if len(reasons) == 1:  # all replicas agree, so the pack is at fault
            raise PackError(reasons.pop())
        why = (
            "; ".join(f"{name}: {reason}" for name, reason in results.items() if reason)
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
        """Apply a state to the engine and report."""
        engine = self._engine
        refusal = ""
        active, metrics = self._take(state.draining)
        try:
            plugged = {info.name: info.digest for info in engine.experts()}
            for name in plugged.keys() - state.experts.keys():
                engine.unplug(name)
            for _, digest in state.experts.items() - plugged.items():
                engine.plug(self._call("pack", digest), in_place=True)
            # A state that has not changed, as for metrics, is not applied again: arming solves all
            # gates.
            if plugged != state.experts or state.arming != self._state.arming:
                engine.arm(state.arming.value)
            self._state = state
        except Exception as error:  # any failure must reach the ledger, which rolls back
            refusal = as_api_error(error).message
        return Report(
            {info.name: info.digest for info in engine.experts()}, refusal, active, metrics
        )


class Figures(Collector):
    """The metrics of several replicas.

    Args:
        texts: metrics in Prometheus' text format, by name of the replica.
    """

    def __init__(self, texts: Mapping[str, str]) -> None:
        self.texts = texts

    def collect(self) -> Iterable[Metric]:
        """Return all metrics, labelled by replica."""
        families: dict[str, Metric] = {}
        for replica, text in self.texts.items():
            for family in text_string_to_metric_families(text):
                merged = families.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                for sample in family.samples:
                    merged.add_sample(
                        sample.name, {**sample.labels, "replica": replica}, sample.value
                    )
        return families.values()
