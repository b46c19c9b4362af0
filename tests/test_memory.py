"""The available memory: the machine's, or a container's if that has less."""

from pathlib import Path

import psutil
import pytest

from deepseek.device import memory
from deepseek.device.choose import CPU


def test_a_container_limits_what_is_there_and_what_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "CONTROL_GROUP", tmp_path)
    machine = psutil.virtual_memory().total
    assert memory.total_memory() == machine
    assert 0 < memory.free_memory(CPU) <= machine
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("file 400000\ninactive_file 300000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.total_memory() == machine
    (tmp_path / "memory.max").write_text("1000000\n")
    assert memory.total_memory() == 1_000_000
    assert memory.free_memory(CPU) == 600_000
