"""Wrong input ends a benchmark with one sentence and exit code 2 (`benchmarks/entry.py`)."""

import argparse
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
from processes import run

from deepseek.errors import DataError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
UNGUARDED = {
    "arrow.py": "a claim measures this file: an edit makes its result stale",
    "house.py": "reads nothing that a user names",
}


@pytest.fixture
def entry(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module("entry")


def test_every_benchmark_says_in_one_sentence_what_is_wrong() -> None:
    programs = {path.name: path.read_text() for path in BENCHMARKS.glob("*.py")}
    bare = {name for name, text in programs.items() if "\n    main()\n" in text}
    assert bare == UNGUARDED.keys()


@pytest.mark.parametrize("error", [DataError("no text."), FileNotFoundError("no text.")])
def test_what_a_user_can_mend_is_a_sentence(
    entry: ModuleType, error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit, match=r"^2$"):
        entry.run_main(main)
    assert capsys.readouterr().err == "error: no text.\n"


@pytest.mark.parametrize(
    ("stop", "said"),
    [
        (KeyboardInterrupt("the same call resumes"), "the same call resumes\n"),
        (KeyboardInterrupt(), "interrupted\n"),
    ],
)
def test_an_interrupted_benchmark_says_what_is_kept(
    entry: ModuleType, stop: KeyboardInterrupt, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        raise stop

    with pytest.raises(SystemExit, match=r"^130$"):
        entry.run_main(main)
    assert capsys.readouterr().err == said


def test_a_process_that_fails_gives_its_exit_code(
    entry: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        subprocess.run([sys.executable, "-c", "exit(3)"], check=True)

    with pytest.raises(SystemExit, match=r"^3$"):
        entry.run_main(main)
    assert "ended with 3; see its messages above" in capsys.readouterr().err


def test_other_errors_keep_their_traceback(entry: ModuleType) -> None:
    def main() -> None:
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        entry.run_main(main)


def test_a_path_to_read_has_to_be_there(entry: ModuleType, tmp_path: Path) -> None:
    assert entry.existing_path(str(tmp_path)) == tmp_path
    with pytest.raises(argparse.ArgumentTypeError, match=r"missing does not exist"):
        entry.existing_path(str(tmp_path / "missing"))


def test_missing_pairs_are_told_before_a_model_is_loaded(tmp_path: Path) -> None:
    missing = tmp_path / "pairs.jsonl"
    done = run([sys.executable, str(BENCHMARKS / "human_prefs.py"), str(missing)])
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(f"{missing} does not exist; check the path.")
    assert "Traceback" not in done.stderr


def test_a_source_says_its_kind(entry: ModuleType, tmp_path: Path) -> None:
    source = entry.Source.of(f"notes=folder:{tmp_path.name}")
    assert (source.title, source.kind) == ("notes", "folder")
    assert source.path(tmp_path.parent) == tmp_path
    with pytest.raises(DataError, match="does not exist"):
        entry.Source.of("git:missing").path(tmp_path)
    for text in ("texts", "dir:texts"):
        with pytest.raises(argparse.ArgumentTypeError, match="write KIND:PATH"):
            entry.Source.of(text)
