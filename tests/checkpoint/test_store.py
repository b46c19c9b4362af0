"""Files and states are complete or absent, and damage is detected."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from deepseek.checkpoint import rename, store
from deepseek.errors import CheckpointError, ConfigError
from deepseek.packs.signature import keygen

TENSORS = {
    "weight": torch.arange(6.0).reshape(2, 3),
    "step": torch.tensor([3]),
    "half": torch.ones(2).bfloat16(),
}
META = {"step": 3, "rng": [1, 2], "note": "é"}


@pytest.mark.parametrize(
    ("stated", "place"),
    [("~/models", "models"), ("", ".cache/deepseek"), (None, ".cache/deepseek")],
)
def test_a_tilde_in_the_variable_of_the_home_is_the_users_folder(
    stated: str | None, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of settings, such as that of a service, sets it as it is written."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("DEEPSEEK_HOME")
    if stated is not None:
        monkeypatch.setenv("DEEPSEEK_HOME", stated)
    assert store.home() == tmp_path / place


def test_the_home_of_an_unknown_user_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPSEEK_HOME", "~no-such-user/models")
    with pytest.raises(ConfigError, match="'~no-such-user/models', but the home of that user"):
        store.home()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), store.atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_is_written_through(tmp_path: Path, exists: bool) -> None:
    target = tmp_path / "disk" / "file"
    target.parent.mkdir()
    if exists:
        target.write_text("old")
    (tmp_path / "link").symlink_to(target)
    with store.atomic_write(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link").is_symlink() and target.read_text() == "new"
    assert [path.name for path in target.parent.iterdir()] == ["file"]


def test_a_failed_folder_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with store.atomic_folder(folder) as temporary:
        (temporary / "a").write_text("old")
    with pytest.raises(RuntimeError), store.atomic_folder(folder) as temporary:
        (temporary / "a").write_text("half")
        raise RuntimeError
    assert (folder / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_new_folder_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    for name in ("first", "second"):
        with store.atomic_folder(tmp_path / "folder") as temporary:
            (temporary / name).touch()
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["second"]
    assert len(list(tmp_path.iterdir())) == 1


def write_folder(path: Path, name: str) -> None:
    with store.atomic_folder(path) as temporary:
        (temporary / name).touch()


def test_a_link_to_a_folder_stays(tmp_path: Path) -> None:
    write_folder(tmp_path / "folder", "first")
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    write_folder(tmp_path / "link", "second")
    assert (tmp_path / "link").is_symlink()
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["second"]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_is_replaced_is_never_missing(tmp_path: Path) -> None:
    folder, end = tmp_path / "folder", threading.Event()
    write_folder(folder, "0")
    missing = []

    def look() -> None:
        while not end.is_set():
            missing.append(not folder.exists())

    reader = threading.Thread(target=look)
    reader.start()
    for number in range(200):
        write_folder(folder, str(number))
    end.set()
    reader.join()
    assert not any(missing)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_full_disk_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a system that cannot exchange two folders atomically."""
    monkeypatch.setattr(store, "exchange", lambda *_: False)
    write_folder(tmp_path / "folder", "first")
    rename = Path.replace

    def fail(path: Path, target: Path) -> Path:
        if (path / "second").exists():
            raise OSError(errno.ENOSPC, "no space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        write_folder(tmp_path / "folder", "second")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["first"]


@pytest.fixture(params=["by the system", "by looking before"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How replacing an existing path is prevented; not all file systems support the first way."""
    if request.param == "by looking before":
        monkeypatch.setattr(rename, "_renameat2", lambda *_: errno.EINVAL)
    return str(request.param)


@pytest.mark.parametrize("theirs", ["full folder", "empty folder", "file", "link to nothing"])
@pytest.mark.parametrize("ours", ["folder", "file"])
@pytest.mark.usefixtures("way")
def test_what_somebody_put_there_meanwhile_stays(ours: str, theirs: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write = store.atomic_folder if ours == "folder" else store.atomic_write
    with (
        pytest.raises(ConfigError, match=r"out was put there .* choose another path"),
        write(out, new=True) as temporary,
    ):
        (temporary / "model" if ours == "folder" else temporary).touch()
        if "folder" in theirs:
            out.mkdir()
        if theirs == "full folder":
            (out / "precious.txt").write_text("mine")
        elif theirs == "file":
            out.write_text("mine")
        elif theirs == "link to nothing":
            out.symlink_to(tmp_path / "nothing")
    assert list(tmp_path.iterdir()) == [out]
    if theirs == "full folder":
        assert (out / "precious.txt").read_text() == "mine"
        assert len(list(out.iterdir())) == 1
    elif theirs == "empty folder":
        assert list(out.iterdir()) == []
    elif theirs == "file":
        assert out.read_text() == "mine"
    else:
        assert out.is_symlink()


@pytest.mark.usefixtures("way")
def test_what_is_new_gets_its_name(tmp_path: Path) -> None:
    with store.atomic_folder(tmp_path / "folder", new=True) as temporary:
        (temporary / "model").touch()
    with store.atomic_write(tmp_path / "file", new=True) as temporary:
        temporary.write_text("new")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["model"]
    assert (tmp_path / "file").read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 2


def test_leftovers_of_one_name_are_removed(tmp_path: Path) -> None:
    """Those of `model.v2` stay: they may be in use, under another lock."""
    (tmp_path / "model").mkdir()
    others = {"model", ".model.lock", ".model.v2.00112233.tmp", ".model.0011223.tmp", "model.tmp"}
    for name in others - {"model"}:
        (tmp_path / name).touch()
    leftover = store.temporary_path(tmp_path / "model")
    leftover.mkdir()
    (leftover / "half").touch()
    store.temporary_path(tmp_path / "model").touch()
    store.remove_leftovers(tmp_path / "model")
    assert {path.name for path in tmp_path.iterdir()} == others
    store.remove_leftovers(tmp_path / "nothing" / "here")


@pytest.fixture
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    """The umask of the process during a test."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077], indirect=True)
def test_whoever_may_read_a_new_file_may_read_weights(umask: int, tmp_path: Path) -> None:
    with store.atomic_folder(tmp_path / "model") as temporary:
        save_file(TENSORS, temporary / "model.safetensors")
        (temporary / "config.json").write_text("{}")
        (temporary / "tool").touch(0o700)
    with store.atomic_write(tmp_path / "hash.safetensors") as temporary:
        save_file(TENSORS, temporary)
    files = [*(tmp_path / "model").iterdir(), tmp_path / "hash.safetensors"]
    modes = {path.name: path.stat().st_mode & 0o777 for path in files}
    usual = 0o666 & ~umask
    assert modes == {
        "model.safetensors": usual,
        "config.json": usual,
        "tool": usual | 0o700,
        "hash.safetensors": usual,
    }


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664])
def test_a_replaced_file_keeps_its_permissions(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    store.write_json(path, 1)
    path.chmod(mode)
    store.write_json(path, 2)
    assert store.read_json(path) == 2
    assert path.stat().st_mode & 0o777 == mode


def test_a_private_key_stays_private(tmp_path: Path) -> None:
    private, public = keygen("me", tmp_path)
    assert private.stat().st_mode & 0o777 == 0o600
    assert public.stat().st_mode & 0o777 == 0o644


def test_json_keeps_its_value(tmp_path: Path) -> None:
    store.write_json(tmp_path / "a.json", META)
    assert store.read_json(tmp_path / "a.json") == META


def test_json_keeps_names_that_are_not_utf_8(tmp_path: Path) -> None:
    value = {"folder": os.fsdecode(b"caf\xe9"), "escape": "caf\\udce9"}
    store.write_json(tmp_path / "a.json", value)
    assert store.read_json(tmp_path / "a.json") == value
    assert json.loads(store.canonical_json(value)) == value


@pytest.mark.parametrize("content", [None, "{", "\xff"])
def test_unreadable_json_is_named(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"a\.json"):
        store.read_json(path)


def test_a_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    store.save_state(tmp_path / "step-00000003", TENSORS, META)
    tensors, meta = store.load_state(tmp_path / "step-00000003")
    assert meta == META
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    file=st.sampled_from(["state.safetensors", "meta.json"]),
    place=st.floats(0, 1, exclude_max=True),
)
def test_any_changed_byte_is_noticed(tmp_path: Path, file: str, place: float) -> None:
    folder = tmp_path / "step-00000003"
    store.save_state(folder, TENSORS, META)
    content = bytearray((folder / file).read_bytes())
    index = int(place * len(content))
    content[index] ^= 0x01
    (folder / file).write_bytes(content)
    try:
        tensors, meta = store.load_state(folder)
    except CheckpointError:
        return
    # Only a change of white space in meta.json may go undetected.
    assert meta == META
    assert chr(content[index] ^ 0x01).isspace()
    assert torch.equal(tensors["weight"], TENSORS["weight"])


def test_the_newest_whole_state_is_found_and_old_ones_are_pruned(tmp_path: Path) -> None:
    assert store.latest_state(tmp_path / "nothing") is None
    for step in (5, 10, 999, 12_345):
        store.save_state(tmp_path / f"step-{step:08d}", TENSORS, META)
    state = tmp_path / "step-00012345" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    (tmp_path / ".step-00099999.0a0a0a0a.tmp").mkdir()
    (tmp_path / "plots").mkdir()
    assert store.latest_state(tmp_path) == tmp_path / "step-00000999"
    store.prune(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "plots",
        "step-00000999",
        "step-00012345",
    ]


def test_a_killed_writer_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "numbers.json"
    program = (
        "import itertools, sys\nfrom deepseek.checkpoint.store import write_json\n"
        "for n in itertools.count(): write_json(sys.argv[1], [n] * 20_000)"
    )
    for _ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", program, str(path)])
        while not path.exists() and writer.poll() is None:
            time.sleep(0.01)
        time.sleep(0.05)
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        numbers = store.read_json(path)
        assert len(numbers) == 20_000
        assert len(set(numbers)) == 1
        path.unlink()
