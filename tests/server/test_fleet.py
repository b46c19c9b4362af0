"""What one replica plugs, all replicas plug, or none: the ledger and its fleets, without Ray, in
one process.
"""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from live_server import save_model
from tiny_expert import save_base, save_expert
from waiting import wait_for

from deepseek.engine.engine import Engine
from deepseek.engine.load import load
from deepseek.errors import PackError
from deepseek.model.experts import ExpertInfo
from deepseek.packs.pack import read_pack
from deepseek.server import fleet as fleet_module
from deepseek.server.errors import ApiError
from deepseek.server.fleet import Fleet, Ledger, State


class Actor:
    """Replaces the Ray actor of a replica; knows whether it is alive."""

    def __init__(self) -> None:
        self.lives = True

    @property
    def __ray_ready__(self) -> Any:
        return self

    async def remote(self) -> bool:
        if not self.lives:
            raise RuntimeError("The actor died.")
        return True


class Box:
    """A ledger on its own event loop, and replicas, each with an engine, that follow it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ledger = folder, Ledger()
        self.engines: list[Engine] = []
        self.lost: list[str] = []
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()

    def call(self, method: str, *arguments: Any) -> Any:
        done: Future[Any] = asyncio.run_coroutine_threadsafe(
            getattr(self.ledger, method)(*arguments), self.loop
        )
        return done.result(30)

    def replica(self, name: str, actor: Actor | None = None) -> Fleet:
        """Start a replica. Its name is added to `lost` when it has ended."""
        engine = Engine(*load(self.folder / "tiny", dtype="float32"))
        self.engines.append(engine)

        def take(draining: bool) -> tuple[int, str]:
            return 0 if draining else 3, f"# TYPE running gauge\nrunning {len(name)}\n"

        one = Fleet(engine, self.call, take, lambda: self.lost.append(name))
        one.join(name, actor or Actor())
        return one

    def pack(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def sets(self) -> list[list[ExpertInfo]]:
        return [list(engine.experts()) for engine in self.engines]

    def names(self) -> list[list[str]]:
        return [[info.name for info in infos] for infos in self.sets()]

    def close(self) -> None:
        for engine in self.engines:
            engine.close()
        asyncio.run_coroutine_threadsafe(self.end(), self.loop).result(30)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    async def end(self) -> None:
        """Remove all replicas from the ledger."""
        for name in list(self.ledger._members):
            self.ledger._strike(name)
        await asyncio.sleep(0.05)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with two experts, and an expert of another model."""
    folder = tmp_path_factory.mktemp("fleet")
    loaded = load(save_model(folder / "tiny"), dtype="float32")
    for seed, name in enumerate(("one", "two"), 1):
        save_expert(loaded, name, folder, seed)
    save_base(folder / "other", attention_bias=True)
    return folder


@pytest.fixture
def box(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Box]:
    monkeypatch.setattr(fleet_module, "LOOK_SECONDS", 0.05)
    one = Box(folder)
    yield one
    one.close()


def refuse(*_: object, **__: object) -> ExpertInfo:
    raise OSError("no space left")


def test_what_one_replica_changes_all_have(box: Box) -> None:
    first, second = box.replica("a"), box.replica("b")
    info = first.plug(box.pack("one"))
    assert box.sets() == [[info], [info]]
    second.plug(box.pack("two"))
    assert second.arm(["two"]) == ("two",)
    assert [[info.armed for info in infos] for infos in box.sets()] == [[False, True]] * 2
    first.unplug("two")
    assert box.names() == [["one"], ["one"]]
    assert box.lost == []


def test_a_later_replica_has_what_the_others_have_before_it_serves(box: Box) -> None:
    first = box.replica("a")
    for name in ("one", "two"):
        first.plug(box.pack(name))
    first.arm(["two"])
    box.replica("b")
    assert box.sets()[0] == box.sets()[1]
    assert first.arm("auto") == ("one", "two")
    first.unplug("one")
    box.replica("c")
    assert box.sets()[0] == box.sets()[1] == box.sets()[2]


def test_a_pack_that_all_refuse_is_refused_as_by_one_engine(box: Box) -> None:
    first, _ = box.replica("a"), box.replica("b")
    first.plug(box.pack("one"))
    with pytest.raises(PackError, match="plugged already"):
        first.plug(box.pack("one"))
    with pytest.raises(PackError, match="No expert named 'two'"):
        first.arm(["one", "two"])
    assert box.names() == [["one"], ["one"]]


def test_what_one_replica_cannot_do_is_undone_everywhere(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = box.replica("a"), box.replica("b")
    first.plug(box.pack("one"))
    first.arm(["one"])
    before = box.sets()
    with monkeypatch.context() as patch:
        for method in ("plug", "unplug"):
            patch.setattr(second._engine, method, refuse)
        with pytest.raises(
            ApiError, match=r"nothing has changed \(b: The server cannot use its disk \(OSError\)"
        ) as raised:
            first.plug(box.pack("two"))
        assert (raised.value.status, raised.value.code) == (503, "not_confirmed")
        with pytest.raises(ApiError, match="nothing has changed"):
            first.unplug("one")
    assert box.sets() == before
    assert box.lost == []
    first.plug(box.pack("two"))
    assert box.names() == [["one", "two"]] * 2


def test_an_expert_is_replaced_everywhere_and_stays_armed(
    box: Box, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = box.replica("a"), box.replica("b")
    for name in ("one", "two"):
        first.plug(box.pack(name))
    first.arm({"one": 0.5})
    before = box.sets()
    path = save_expert(load(folder / "tiny", dtype="float32"), "one", tmp_path, 7)
    with monkeypatch.context() as patch:
        patch.setattr(second._engine, "plug", refuse)
        with pytest.raises(ApiError, match="nothing has changed"):
            first.plug(path, in_place=True)
    assert box.sets() == before and box.lost == []
    info = first.plug(path, in_place=True)
    assert info.digest != before[0][0].digest
    assert [(one.name, one.weight) for one in box.sets()[0]] == [("one", 0.5), ("two", 0.0)]
    assert box.sets()[0] == box.sets()[1]


def test_a_digest_that_differs_is_no_confirmation(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = box.replica("a"), box.replica("b")
    two = read_pack(box.pack("two"))
    plug = second._engine.plug
    monkeypatch.setattr(second._engine, "plug", lambda _pack, **_: plug(two))
    with pytest.raises(ApiError, match="b: its digests differ"):
        first.plug(box.pack("one"))
    assert box.names() == [[], []]


def test_a_replica_that_cannot_go_back_ends(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = box.replica("a"), box.replica("b")
    monkeypatch.setattr(first._engine, "unplug", refuse)
    monkeypatch.setattr(second._engine, "plug", refuse)
    with pytest.raises(ApiError, match="nothing has changed"):
        first.plug(box.pack("one"))
    wait_for(lambda: box.lost == ["a"])
    second.unplug("two")


def test_a_replica_that_died_is_struck_off(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    first, actor = box.replica("a"), Actor()
    second, end = box.replica("b", actor), threading.Event()
    monkeypatch.setattr(second, "_hold", lambda _: end.wait())  # it stops reporting
    actor.lives = False
    with pytest.raises(ApiError, match="b: it does not answer"):
        first.plug(box.pack("one"))
    assert box.names() == [[], []]
    first.plug(box.pack("one"))
    assert box.names() == [["one"], []]
    end.set()


def test_a_replica_that_hangs_is_struck_off_and_the_change_undone(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_module, "LOOKS", 3)
    first, second, go_on = box.replica("a"), box.replica("b"), threading.Event()
    hold = second._hold

    def slowly(state: State) -> Any:
        go_on.wait()
        return hold(state)

    monkeypatch.setattr(second, "_hold", slowly)
    with pytest.raises(ApiError, match="b: it does not answer"):
        first.plug(box.pack("one"))
    assert box.names()[0] == []
    first.plug(box.pack("one"))
    assert box.lost == []
    go_on.set()
    wait_for(lambda: box.lost == ["b"])


def test_many_changes_at_once_leave_all_with_the_same(box: Box) -> None:
    fleets = [box.replica(name) for name in "abc"]

    def change(fleet: Fleet, name: str) -> None:
        for _ in range(5):
            try:
                fleet.plug(box.pack(name))
                fleet.unplug(name)
            except (PackError, ApiError):  # another change came first
                pass

    threads = [
        threading.Thread(target=change, args=(fleet, name))
        for fleet in fleets
        for name in ("one", "two")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert box.names()[0] == box.names()[1] == box.names()[2]
    assert box.lost == []


def test_figures_name_their_replica(box: Box) -> None:
    first, _ = box.replica("a"), box.replica("bb")
    text = first.metrics().decode()
    assert 'running{replica="a"} 1.0' in text
    assert 'running{replica="bb"} 2.0' in text
    assert text.count("# TYPE running gauge") == 1


def test_asking_for_metrics_leaves_the_experts_as_they_are(box: Box) -> None:
    """Arming recomputes all gates, too much work for every scrape."""
    first, _ = box.replica("a"), box.replica("b")
    first.plug(box.pack("one"))
    first.arm({"one": 0.5})
    before = [engine.model.experts._state for engine in box.engines]
    first.metrics()
    after = [engine.model.experts._state for engine in box.engines]
    assert all(now is then for now, then in zip(after, before, strict=True))


def test_draining_reaches_all_and_stays(box: Box) -> None:
    first, _ = box.replica("a"), box.replica("b")
    assert [report.active for report in box.call("reports").values()] == [3, 3]
    assert [report.active for report in box.call("reports", True).values()] == [0, 0]
    first.plug(box.pack("one"))
    assert [report.active for report in box.call("reports").values()] == [0, 0]


def test_a_pack_of_another_model_is_refused(box: Box, folder: Path, tmp_path: Path) -> None:
    first, _ = box.replica("a"), box.replica("b")
    foreign = load(folder / "other", dtype="float32")
    save_expert(foreign, "foreign", tmp_path, 3)
    with pytest.raises(PackError, match="expert pack foreign is refused"):
        first.plug(tmp_path / "foreign.safetensors")
    assert box.names() == [[], []]
