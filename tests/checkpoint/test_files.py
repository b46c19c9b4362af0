"""Paths from users: what cannot be read or written is refused early, and nothing blocks."""

import os
import socket
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deepseek.checkpoint.files import (
    existing_path,
    located,
    new_path,
    readable_file,
    stored_model_name,
    writable_file,
    writable_folder,
)
from deepseek.checkpoint.store import atomic_write, read_json, read_object, write_json
from deepseek.errors import CheckpointError, ConfigError, DataError


@pytest.fixture
def odd(tmp_path: Path) -> dict[str, Path]:
    """Paths that are not regular files, by kind."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "to pipe").symlink_to(tmp_path / "pipe")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "socket"))
    server.close()
    names = ("pipe", "folder", "dangling", "loop", "to pipe", "socket")
    return {name: tmp_path / name for name in names} | {
        "device": Path("/dev/zero"),
        "missing": tmp_path / "missing",
        "long": tmp_path / ("x" * 300),
        "nul": Path("a\0b"),
    }


def test_what_is_no_readable_file_is_refused_without_waiting(odd: dict[str, Path]) -> None:
    for what, path in odd.items():
        with pytest.raises(DataError, match="give one file"):
            readable_file(path, "one file")
        with pytest.raises(CheckpointError):
            read_json(path)
        if what != "folder":
            with pytest.raises(DataError, match="check the path"):
                existing_path(path)


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/zero", "/dev/new", "/dev/../dev/x", "pipe"])
def test_a_device_is_never_written_over(odd: dict[str, Path], name: str) -> None:
    """As root, writing would replace it with a regular file and break other programs."""
    path = odd.get(name, Path(name))
    with pytest.raises(ConfigError, match=r"cannot be written, it (is a device|lies in /dev)"):
        writable_file(path)
    memory = Path("/dev/shm/out")
    assert not memory.parent.is_dir() or writable_file(memory) == memory


def test_a_local_model_is_stored_by_its_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m.gguf").symlink_to(tmp_path / "blob")
    (tmp_path / "blob").touch()
    (tmp_path / "smollm2-135m").mkdir()
    monkeypatch.chdir(tmp_path / "m")
    for given_name in ("../m", ".", "../m/"):
        assert stored_model_name(given_name) == str(tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    assert stored_model_name("m.gguf") == str(tmp_path / "m.gguf")
    for name in ("smollm2-135m", "owner/name", "trained-here", "~nobody-of-this-name", "a\0b"):
        assert stored_model_name(name) == name


def test_a_file_may_be_too_large(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert readable_file(tmp_path / "file", "one", most_bytes=5).is_file()
    with pytest.raises(ConfigError, match="has 5 bytes, more than 4"):
        readable_file(tmp_path / "file", "one", ConfigError, most_bytes=4)


@pytest.mark.parametrize("where", ["", "deep/er/", "file/", "/proc/", "/dev/null/"])
def test_what_can_be_written_is_known_before(where: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / where / "out"
    before = sorted(tmp_path.rglob("*"))
    if where in ("", "deep/er/"):
        writable_file(path)
        writable_folder(path, mark="config.json")
        assert sorted(tmp_path.rglob("*")) == before
        with atomic_write(path) as temporary:
            temporary.touch()
    else:
        for check in (writable_file, writable_folder):
            with pytest.raises(ConfigError, match="cannot be written"):
                check(path)
        with pytest.raises(OSError), atomic_write(path) as temporary:
            temporary.touch()


def test_a_folder_with_other_things_in_it_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=r"holds other files and no config\.json"):
        writable_folder(tmp_path, mark="config.json")
    assert writable_folder(tmp_path) == tmp_path
    (tmp_path / "config.json").touch()
    assert writable_folder(tmp_path, mark="config.json") == tmp_path


@settings(max_examples=300, deadline=None)
@given(name=st.text(max_size=300) | st.just("é" * 130))
@example("~nobody-of-this-name/x")
@example("\ud800")
@example("a\0b")
@example(".")
@example("/")
def test_any_name_is_accepted_or_a_sentence(name: str) -> None:
    for check in (located, writable_file, writable_folder):
        try:
            check(name)
        except ConfigError as error:
            assert str(error).endswith(".")
    for read in (existing_path, lambda path: readable_file(path, "one")):
        try:
            read(name)
        except DataError as error:
            assert str(error).endswith(".")


def test_a_value_of_another_type_is_no_object(tmp_path: Path) -> None:
    for value in ([1], "text", 3, None):
        write_json(tmp_path / "x.json", value)
        with pytest.raises(CheckpointError, match=r"x\.json holds a .* and no JSON object"):
            read_object(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize("name", ["pipe", "folder", "dangling", "loop", "socket", "long", "nul"])
def test_what_is_there_or_cannot_be_is_no_new_path(odd: dict[str, Path], name: str) -> None:
    with pytest.raises(ConfigError, match="choose another path"):
        new_path(odd[name])


def test_a_new_path_leaves_no_trace(tmp_path: Path) -> None:
    assert new_path(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert not any(tmp_path.iterdir())


def test_the_home_is_found_where_the_shell_leaves_it_as_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for check in (new_path, writable_file, writable_folder):
        assert check("~/out") == tmp_path / "out"  # as of `--out=~/out`
    (tmp_path / "out").touch()
    assert existing_path("~/out") == tmp_path / "out"
    assert readable_file("~/out", "one") == tmp_path / "out"
    with pytest.raises(ConfigError, match="exists already"):
        new_path("~/out")
