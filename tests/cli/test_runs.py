"""`deepseek runs rm`: what it removes, what it says is lost, and what it refuses."""

import subprocess
import sys
from pathlib import Path

import pytest

from deepseek.checkpoint.store import write_json
from deepseek.cli.main import main
from deepseek.train.loop.run_lock import run_lock

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with the runs of an expert and of a model, and with an unfinished one."""
    monkeypatch.setenv("DEEPSEEK_HOME", str(tmp_path))
    runs = tmp_path / "runs"
    for name in ("shop", "polite", "half"):
        write_json(runs / name / "request.json", {"base": "tiny"})
    for name in ("shop", "polite"):
        write_json(runs / name / "result.json", {"after": 1.5})
    pack = tmp_path / "experts" / "shop.safetensors"
    pack.parent.mkdir()
    pack.write_bytes(b"0")
    return runs


def rm(capsys: Capture, *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(["runs", "rm", *words])
    printed = capsys.readouterr()
    return int(stop.value.code or 0), printed.out, printed.err


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("shop", "the expert shop cannot be updated, merged, indexed, or evaluated"),
        ("half", "It is unfinished, and what it has done is lost."),
        ("polite", ""),
    ],
)
def test_it_says_what_is_lost(name: str, loss: str, runs: Path, capsys: Capture) -> None:
    status, _, err = rm(capsys, name)
    assert status == 2 and "add --yes" in err and loss in err
    assert (runs / name).is_dir()
    status, out, err = rm(capsys, name, "--yes")
    assert status == 0 and f"removed {runs / name}" in out
    assert loss in err if loss else not err
    assert not (runs / name).exists()
    left = {folder.name for folder in runs.iterdir() if folder.is_dir()}
    assert left == {"shop", "polite", "half"} - {name}
    assert (runs.parent / "experts" / "shop.safetensors").is_file()


@pytest.mark.parametrize("name", ["shpo", "../runs/shop", ".", "", ".."])
def test_other_names_are_refused(name: str, runs: Path, capsys: Capture) -> None:
    status, _, err = rm(capsys, name, "--yes")
    assert status == 2 and "There is no run" in err
    assert (runs / "shop" / "result.json").is_file()


def test_a_run_that_is_written_is_refused(runs: Path, capsys: Capture) -> None:
    with run_lock(runs / "half"):
        asked = subprocess.run(
            [sys.executable, "-m", "deepseek", "runs", "rm", "half", "--yes"],
            capture_output=True,
            text=True,
            check=False,
        )
    assert asked.returncode == 2 and "is in use by process" in asked.stderr
    assert (runs / "half").is_dir()
