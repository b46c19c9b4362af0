"""`deepseek bench` lists the benchmarks and passes options on to them."""

import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

from deepseek.cli import bench
from deepseek.cli.bench import ALIASES, FOLDER, measurements
from deepseek.cli.main import main


def run(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", *arguments])
    return stop.value.code


def test_every_alias_names_a_measurement() -> None:
    assert {f"{name}.py" for name in ALIASES.values()} <= {
        file.name for file in FOLDER.glob("*.py")
    }
    assert set(ALIASES) <= set(measurements())
    assert "results" not in measurements()


def test_measurements_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in measurements())


def test_options_are_handed_on(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("preferences", "--help") == 0
    assert "--json" in capfd.readouterr().out


def test_an_interrupted_benchmark_stops_at_a_safe_point(tmp_path: Path) -> None:
    note = tmp_path / "note"
    (tmp_path / "slow.py").write_text(
        '"""Waits."""\nimport time\nfrom pathlib import Path\n\n\n'
        "def main(note):\n"
        "    try:\n        note.write_text('started')\n        time.sleep(60)\n"
        "    except KeyboardInterrupt:\n"
        "        time.sleep(1)  # longer than `subprocess.run` would wait\n"
        f"        note.write_text('stopped safely')\n\n\nmain(Path({str(note)!r}))\n"
    )
    program = (
        "import signal, sys\nfrom pathlib import Path\n"
        "from deepseek.cli import bench\nfrom deepseek.cli.main import main\n"
        # Background jobs of a shell are started with the signal ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "bench.FOLDER = Path(sys.argv[1])\nmain(['bench', 'slow'])"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)]) as process:
        deadline = time.monotonic() + 60
        while not note.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(timeout=60) == 130
    assert note.read_text() == "stopped safely"


def test_a_misspelt_name_is_answered(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("atention") == 2
    assert "'attention'" in capsys.readouterr().err


def test_without_a_checkout_it_says_what_is_needed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    assert run("attention") == 2
    assert "clone" in capsys.readouterr().err


def test_comparisons_are_drawn_and_rivals_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    bars = import_module("bars")
    assert bars.installed("json") == Path(sys.executable)
    assert bars.installed("no_such_rival") is None
    figures = {"decoding": {"ours int8": 174.0, "theirs": 105.0}, "prefill": {"ours int8": 2043.0}}
    bars.draw(tmp_path / "one.png", figures)
    bars.draw(tmp_path / "two.png", {**figures, "prefill": {"theirs": 2043.0}})
    first, second = ((tmp_path / name).read_bytes() for name in ("one.png", "two.png"))
    assert first.startswith(b"\x89PNG")
    assert first != second


@pytest.mark.parametrize(
    ("name", "script"), [("serve", "batch"), ("decode", "decode"), ("prefill", "decode")]
)
def test_comparisons_with_rivals_have_short_names(name: str, script: str) -> None:
    assert ALIASES.get(name, name) == script
    source = (FOLDER / f"{script}.py").read_text()
    assert "--plot" in source
    assert "installed(" in source or "add_llama(" in source
