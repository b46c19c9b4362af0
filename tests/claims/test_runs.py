"""`deepseek claims` and `deepseek claims run`: table, wrong names, choice of commands, failures and
Ctrl-C (`deepseek.claims.runs`, `deepseek.cli.claims`).
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from claim_files import commit_all, make_checkout, write_result

from deepseek.claims.child import STOPS, run_python
from deepseek.claims.declaration import read_declaration
from deepseek.claims.evaluation import claim_table
from deepseek.claims.history import History
from deepseek.claims.runs import Places, check_corpora, due_results, run_commands
from deepseek.cli import claims
from deepseek.cli.main import main
from deepseek.errors import ConfigError

BENCHMARK = """
import json, sys
from pathlib import Path
path = Path(sys.argv[-1])
path.parent.mkdir(parents=True, exist_ok=True)
path.write_text(json.dumps({"rounds": {"ours": [8.0], "theirs": [2.0]}, "commit": "unknown"}))
"""

STOPS_SAFELY = """
import sys, time
from pathlib import Path
try:
    Path(sys.argv[1]).write_text("started")
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(0.2)
    Path(sys.argv[1]).write_text("stopped safely")
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout that the command line uses as its own."""
    folder = make_checkout(tmp_path / "clone")
    (folder / "benchmarks" / "speed.py").write_text(BENCHMARK)
    (folder / "benchmarks" / "quick_home.py").write_text("")
    (folder / "benchmarks" / "gain.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(claims, "CHECKOUT", folder)
    return folder


def call(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as stop:
        main(["claims", *arguments])
    return stop.value.code


def test_the_table_shows_every_claim_with_figure_bound_and_state(
    checkout: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    (checkout / "package" / "engine" / "step.py").write_text("new\n")
    commit_all(checkout)
    assert call() == 0
    printed = capsys.readouterr().out
    assert "reached, stale" in printed
    assert "3.0x (2.0 to 3.0x)" in printed and ">= 2.0x" in printed
    assert printed.count("not run") >= 3
    assert "2 claims: 1 reached, 0 partly, 0 missed, 1 not run" in printed


def test_a_claim_in_full_has_protocol_sides_machine_commit_and_command(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("show", "fast") == 0
    printed = capsys.readouterr().out
    for part in ("In turns.", "ours 6; theirs 2", "A, 2 cores", "python x", "over 3 rounds"):
        assert part in printed
    assert call("show", "better", "--json") == 0
    assert json.loads(capsys.readouterr().out)["why"] == "Too little text."


@pytest.mark.parametrize("spoilt", ['{"rounds": {"ou', "[]", "null"])
def test_a_spoilt_result_is_named(
    spoilt: str, checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkout / "benchmarks" / "results" / "speed.json").write_text(spoilt)
    for words in ((), ("show", "better"), ("run", "fast")):
        assert call(*words) == 2
        said = capsys.readouterr().err
        assert "results/speed.json" in said and "restore it or delete it" in said


def test_json_before_the_subcommand_is_refused(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("--json", "show", "fast") == 2
    told = capsys.readouterr()
    assert "write `deepseek claims show NAME --json`" in told.err and not told.out


@pytest.mark.parametrize("words", [("show", "fats"), ("run", "fats"), ("run", "fats", "--quick")])
def test_a_misspelt_name_is_answered(
    words: tuple[str, ...], checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*words) == 2
    assert "perhaps 'fast' is meant" in capsys.readouterr().err


def test_outside_a_checkout_it_says_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(claims, "CHECKOUT", tmp_path)
    for words in ((), ("show", "fast"), ("run", "fast")):
        assert call(*words) == 2
        assert "clone of the repository" in capsys.readouterr().err


def test_running_a_claim_writes_its_result(
    checkout: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert call("run", "fast") == 0
    assert "[1/1] speed: python benchmarks/speed.py --json" in capfd.readouterr().err
    assert claim_table(checkout).claims[0].figures[0].value == 4.0


def test_a_quick_run_keeps_no_figure_and_says_so(
    checkout: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = (checkout / "benchmarks" / "results" / "speed.json").read_text()
    assert call("run", "all", "--quick") == 0
    said = capfd.readouterr().err
    assert "no figure" in said
    assert "without a quick command: elsewhere, gain" in said
    assert (checkout / "benchmarks" / "results" / "speed.json").read_text() == before


def test_a_claim_without_a_quick_benchmark_runs_nothing(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("run", "better", "--quick") == 0
    assert "nothing to run" in capsys.readouterr().out


def test_a_result_without_a_command_is_named_with_the_one_that_made_it(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = checkout / "benchmarks" / "claims.yaml"
    declared = yaml.safe_load(file.read_text())
    del declared["results"]["speed"]["command"]
    file.write_text(yaml.safe_dump(declared, sort_keys=False))
    assert call("run", "fast") == 2
    assert "no command fetches all that it takes" in capsys.readouterr().err


def test_text_that_is_missing_stops_before_anything_runs(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("run", "better") == 2
    said = capsys.readouterr().err
    assert "python benchmarks/corpora.py code" in said
    assert "[1/1]" not in said


def test_all_runs_what_is_missing_or_stale(checkout: Path) -> None:
    declared = read_declaration(checkout)

    def due(only_stale: bool) -> list[str]:
        return due_results(declared, claim_table(checkout).claims, False, only_stale)

    assert due(only_stale=False) == ["speed", "gain"]
    assert due(only_stale=True) == ["gain"]
    (checkout / "package" / "engine" / "step.py").write_text("new\n")
    head = commit_all(checkout)
    assert due(only_stale=True) == ["speed", "gain"]
    write_result(checkout, "gain", head, gain=1.0)
    assert due(only_stale=True) == ["speed"]


def test_a_failure_is_named_and_the_others_run(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "bad.py").write_text("raise SystemExit(3)")
    (tmp_path / "good.py").write_text("open('done', 'w')")
    commands = {"bad": ["bad.py"], "good": ["good.py"]}
    assert run_commands(commands, tmp_path, said.append) == ["bad"]
    assert (tmp_path / "done").exists()
    assert "bad failed (exit code 3)" in said


def test_commands_side_by_side_say_what_a_failed_one_printed(tmp_path: Path) -> None:
    """The first two wait for each other, and the third one for a free slot."""
    waits = "import sys, time\nfrom pathlib import Path\nmine, other = map(Path, sys.argv[1:])\n"
    waits += "mine.touch()\nwhile not other.exists(): time.sleep(0.01)\nprint('met', mine.name)"
    (tmp_path / "waits.py").write_text(waits)
    (tmp_path / "bad.py").write_text("print('the cause')\nraise SystemExit(3)")
    commands = {"one": ["waits.py", "a", "b"], "two": ["waits.py", "b", "a"], "bad": ["bad.py"]}
    said: list[str] = []
    assert run_commands(commands, tmp_path, said.append, at_once=2, logs=tmp_path) == ["bad"]
    assert [line.split(":")[0] for line in said[:3]] == ["[1/3] one", "[2/3] two", "[3/3] bad"]
    assert said[3:] == ["the cause", "bad failed (exit code 3)"]
    assert (tmp_path / "one.log").read_text() == "met a\n"


def test_a_quick_run_ends_where_its_preparation_fails(
    checkout: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (checkout / "benchmarks" / "quick_home.py").write_text("raise SystemExit(1)")
    assert call("run", "fast", "--quick") == 2
    said = capfd.readouterr().err
    assert "preparation failed; see the messages above" in said
    assert "speed.py" not in said


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])
def test_all_that_run_side_by_side_stop_at_a_safe_point(handler: Any, tmp_path: Path) -> None:
    """Even if SIGINT is ignored, as for background jobs of a shell."""
    usual = signal.signal(signal.SIGINT, handler)
    try:
        check_that_all_stop_at_a_safe_point(tmp_path)
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, usual)


def check_that_all_stop_at_a_safe_point(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(STOPS_SAFELY)
    notes = [tmp_path / "a", tmp_path / "b"]
    commands = {note.name: ["slow.py", str(note)] for note in notes}

    def interrupted(line: str) -> None:
        """Raise as Ctrl-C would while the last command, which has a free slot, is started."""
        if line.startswith("[3/3]"):
            while not all(note.exists() and note.read_text() for note in notes):
                time.sleep(0.01)
            raise KeyboardInterrupt

    commands["last"] = ["slow.py", str(tmp_path / "c")]
    with pytest.raises(KeyboardInterrupt, match="interrupted during a, b, last, nothing is"):
        run_commands(commands, tmp_path, interrupted, at_once=3, logs=tmp_path)
    assert [note.read_text() for note in notes] == ["stopped safely"] * 2


def test_commands_get_their_places(tmp_path: Path) -> None:
    places = Places.below(tmp_path)
    words = places.filled_in("x.py CORPORA/a CORPORA --json RESULT --plot PLOT --work WORK", "r")
    assert words == [
        "x.py",
        f"{tmp_path}/corpora/a",
        f"{tmp_path}/corpora",
        "--json",
        f"{tmp_path}/results/r.json",
        "--plot",
        f"{tmp_path}/results/r.png",
        "--work",
        f"{tmp_path}/bench/r",
    ]
    with pytest.raises(ConfigError, match=r"corpora\.py all"):
        check_corpora([words], places.corpora)
    words = places.filled_in("x.py CORPORA/a CORPORA/many", "r")
    with pytest.raises(ConfigError, match=r"corpora\.py a` and .*corpora\.py many --megabytes 1`"):
        check_corpora([words], places.corpora)


def test_what_an_interrupted_run_keeps_is_not_found_after_a_change(checkout: Path) -> None:
    places = Places.below(checkout)
    paths = ["package/engine"]
    before = History(checkout).version(paths, "x.py WORK")
    assert places.filled_in("x.py WORK", "r", before) == ["x.py", f"{checkout}/bench/r-{before}"]
    (checkout / "package" / "train.py").write_text("new\n")
    commit_all(checkout)
    assert History(checkout).version(paths, "x.py WORK") == before, "it measures other code"
    assert History(checkout).version(paths, "x.py WORK --tokens 2") != before
    (checkout / "package" / "engine" / "step.py").write_text("new\n")
    commit_all(checkout)
    assert History(checkout).version(paths, "x.py WORK") != before


@pytest.mark.parametrize(
    ("number", "status", "said"),
    [
        (signal.SIGINT, 0, "interrupted during slow, nothing is finished"),
        (signal.SIGTERM, 128 + signal.SIGTERM, ""),
        (signal.SIGHUP, 128 + signal.SIGHUP, ""),
    ],
)
def test_a_benchmark_that_is_told_to_stop_does_so_at_a_safe_point(
    number: signal.Signals, status: int, said: str, tmp_path: Path
) -> None:
    (tmp_path / "slow.py").write_text(STOPS_SAFELY)
    note = tmp_path / "note"
    program = (
        "import signal, sys\nfrom pathlib import Path\n"
        "from deepseek.claims.runs import run_commands\n"
        # Background jobs of a shell are started with the signal ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "try:\n run_commands({'slow': ['slow.py', sys.argv[1]]}, Path(sys.argv[2]), print)\n"
        "except KeyboardInterrupt as stop:\n print(stop)"
    )
    command = [sys.executable, "-c", program, str(note), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not note.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(process.pid, number)
        printed, _ = process.communicate(timeout=60)
    assert note.read_text() == "stopped safely"
    assert said in printed
    assert process.returncode == status


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_benchmark_starts_stops_it_too(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow.py").write_text(STOPS_SAFELY)
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def start(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(popen(*arguments, **options))
        signal.raise_signal(number)  # before anyone has the process
        return started[0]

    monkeypatch.setattr("deepseek.claims.child.subprocess.Popen", start)
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            run_python(["slow.py", str(tmp_path / "note")], tmp_path, os.environ)
        assert started[0].wait(1) is not None
    finally:
        signal.signal(signal.SIGINT, usual)
        started[0].kill()


def test_an_ignored_hang_up_stays_ignored_and_handlers_come_back(tmp_path: Path) -> None:
    (tmp_path / "hang_up.py").write_text("import os, signal; os.kill(os.getppid(), signal.SIGHUP)")
    before = [signal.getsignal(number) for number in STOPS]
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as `nohup` does
        assert run_python(["hang_up.py"], tmp_path, os.environ) == 0
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with pytest.raises(SystemExit):
            run_python(["hang_up.py"], tmp_path, os.environ)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    finally:
        for number, handler in zip(STOPS, before, strict=True):
            signal.signal(number, handler)
