"""A new output has one writer; leftovers of a killed one are removed by the next."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from deepseek.checkpoint.output import new_file, new_folder, scratch_folder
from deepseek.checkpoint.store import temporary_path
from deepseek.errors import ConfigError

KILLED = """
import sys, time
from pathlib import Path
from deepseek.checkpoint.output import new_folder, scratch_folder

out = Path(sys.argv[1])
with new_folder(out) as folder, scratch_folder(out) as scratch:
    (folder / "weights").write_text("half")
    (scratch / "weights").write_text("half")
    print("writing", flush=True)
    time.sleep(600)
"""


def test_one_process_writes_and_the_next_removes_what_it_left(tmp_path: Path) -> None:
    out = tmp_path / "model"
    command = [sys.executable, "-c", KILLED, str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writing\n"
        before = sorted(tmp_path.iterdir())
        with (
            pytest.raises(ConfigError, match=r"being written by another process; .*choose"),
            new_folder(out),
        ):
            raise AssertionError("not reached")
        assert sorted(tmp_path.iterdir()) == before
        with new_folder(tmp_path / "other"):
            pass
        os.kill(writer.pid, signal.SIGKILL)
    assert len(before) == 3  # two folders, the lock
    with new_folder(out) as folder:
        (folder / "weights").touch()
        assert not set(before[:2]) & set(tmp_path.iterdir())
    assert sorted(tmp_path.iterdir()) == [out, tmp_path / "other"]


def test_a_second_writer_in_this_process_is_refused_too(tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    with new_file(out) as temporary:
        temporary.write_text("first")
        with pytest.raises(ConfigError, match="being written"), new_file(out):
            raise AssertionError("not reached")
    assert out.read_text() == "first"
    assert list(tmp_path.iterdir()) == [out]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    leftover = temporary_path(out)
    leftover.mkdir()
    with pytest.raises(RuntimeError), new_file(out) as temporary, scratch_folder(out) as scratch:
        assert not leftover.exists()
        temporary.touch()
        (scratch / "stock").mkdir()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exists already"), new_folder(tmp_path):
        raise AssertionError("not reached")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("new", [new_file, new_folder])
def test_a_path_below_the_home_folder_is_there(
    new: Callable[[str], AbstractContextManager[Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("home", "work"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    with new("~/model") as temporary, scratch_folder("~/model") as scratch:
        assert scratch.parent == temporary.parent == tmp_path / "home"
        if new is new_file:
            temporary.touch()
    assert [*(tmp_path / "home").iterdir()] == [tmp_path / "home" / "model"]
    assert [*(tmp_path / "work").iterdir()] == []


def test_a_lock_that_cannot_be_taken_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / ".model.lock").mkdir()
    with (
        pytest.raises(ConfigError, match=r"\.model\.lock cannot be locked .*delete it"),
        new_folder(tmp_path / "model"),
    ):
        raise AssertionError("not reached")
