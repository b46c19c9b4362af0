"""A run folder has one writer: others learn who it is, and a killed one leaves no lock behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from deepseek.errors import TrainError
from deepseek.train.loop.run_lock import run_lock

HOLD = """
import pathlib, sys, time
from deepseek.train.loop.run_lock import run_lock
with run_lock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> subprocess.Popen[str]:
    """Another process that holds the lock of `run`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_told_the_owner_and_changes_nothing(
    holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    before = sorted((path.name, path.stat().st_mtime_ns) for path in tmp_path.iterdir())
    refused = rf"in use by process {holder.pid} on .* since 20"
    with pytest.raises(TrainError, match=refused), run_lock(tmp_path / "run"):
        pytest.fail("two writers")
    with (
        pytest.raises(TrainError, match=refused),
        run_lock(tmp_path / ".." / tmp_path.name / "run"),
    ):
        pytest.fail("two writers")
    assert sorted((path.name, path.stat().st_mtime_ns) for path in tmp_path.iterdir()) == before
    holder.kill()
    holder.communicate()


def test_the_lock_of_a_killed_process_is_free(
    holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    holder.communicate()
    with run_lock(tmp_path / "run"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [".run.lock"]


def test_a_thread_may_take_its_lock_again_and_others_may_not(tmp_path: Path) -> None:
    refused: list[str] = []

    def other() -> None:
        try:
            with run_lock(tmp_path / "run"):
                pass
        except TrainError as error:
            refused.append(str(error))

    with run_lock(tmp_path / "run"):
        with run_lock(tmp_path / "run"):
            pass
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(refused) == 1 and f"process {os.getpid()} " in refused[0]


def test_many_processes_at_once_write_one_after_another(tmp_path: Path) -> None:
    script = """
import pathlib, sys, time
from deepseek.errors import TrainError
from deepseek.train.loop.run_lock import run_lock
mark = pathlib.Path(sys.argv[1]) / "inside"
for _ in range(30):
    try:
        with run_lock(mark.parent / "run"):
            mark.touch(exist_ok=False)
            time.sleep(0.002)
            mark.unlink()
    except TrainError:
        pass
"""
    processes = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path)]) for _ in range(3)]
    started = time.monotonic()
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0], started
