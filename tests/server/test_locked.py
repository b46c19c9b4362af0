"""A server with a lock plugs exactly the packs that it lists, or none."""

from pathlib import Path
from typing import Any

import pytest
from live_server import save_model
from tiny_expert import save_expert

from deepseek.engine.engine import Engine
from deepseek.engine.load import load
from deepseek.engine.start import start_engine
from deepseek.errors import PackError
from deepseek.packs.lock import lock_packs, write_lock
from deepseek.server import run
from deepseek.server.settings import Settings


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model."""
    return save_model(tmp_path_factory.mktemp("base") / "tiny")


def serve_locked(base: Path, folder: Path, **options: Any) -> None:
    """Serve the packs of a folder by its lock file."""
    settings = Settings(port=0, experts_folder=folder)
    run.serve(base, settings=settings, lock=folder / "deepseek.lock", device="cpu", **options)


def locked(base: Path, folder: Path) -> Path:
    """Save two experts and a lock of one; return the file of the locked one."""
    loaded = load(base, dtype="float32")
    packs = [save_expert(loaded, name, folder, seed) for seed, name in enumerate(("one", "two"))]
    write_lock(folder / "deepseek.lock", lock_packs(packs[:1]))
    return packs[0]


def test_exactly_the_locked_packs_are_plugged(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked(base, tmp_path)
    plugged: list[str] = []

    def started(*given: Any, **options: Any) -> Engine:
        engine = start_engine(*given, **options)
        plugged.extend(info.name for info in engine.experts())
        raise PackError("enough.")

    monkeypatch.setattr(run, "start_engine", started)
    with pytest.raises(PackError, match="enough"):
        serve_locked(base, tmp_path)
    assert plugged == ["one"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [("one", r"Expert one has the digest .* the lock states"), ("two", "names expert one, and")],
)
def test_a_pack_that_changes_while_the_base_is_loaded_is_refused(
    name: str, reason: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = locked(base, tmp_path)

    def start(*given: Any, **options: Any) -> Engine:
        save_expert(load(base, dtype="float32"), name, tmp_path, 7).replace(path)
        return start_engine(*given, **options)

    monkeypatch.setattr(run, "start_engine", start)
    with pytest.raises(PackError, match=reason):
        serve_locked(base, tmp_path)


def test_a_lock_without_its_signature_is_refused_on_request(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anyone who can write the file could remove the signature."""
    monkeypatch.setenv("DEEPSEEK_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(run, "listen", lambda _: pytest.fail("the lock is accepted"))
    locked(base, tmp_path)
    with pytest.raises(PackError, match="not signed by a trusted key"):
        serve_locked(base, tmp_path, lock_trusted=True)
