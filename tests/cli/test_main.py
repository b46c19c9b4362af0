"""The command line starts fast, and every user error gives one sentence and exit code 2."""

import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from types import FunctionType, ModuleType

import pytest
import typer

from deepseek import __version__
from deepseek.cli.main import COMMANDS, main
from deepseek.errors import ConfigError

Capture = pytest.CaptureFixture[str]
FAKE = "deepseek.cli.fake"


def run(*arguments: str) -> int:
    """Return the exit status of the command line, run in this process."""
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert isinstance(stop.value.code, int)
    return stop.value.code


def install(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Add a command `fake` that ends with `error`."""
    app = typer.Typer()

    @app.command()
    def fake(prompt: str = "") -> None:
        print(prompt)
        raise error

    module = ModuleType(FAKE)
    module.app = app  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, FAKE, module)
    monkeypatch.setitem(COMMANDS, "fake", ("fake:app", "Fails."))


def test_help_is_quick() -> None:
    times = []
    for _ in range(3):
        started = time.perf_counter()
        result = subprocess.run(
            [sys.executable, "-m", "deepseek", "--help"], capture_output=True, text=True, check=True
        )
        times.append(time.perf_counter() - started)
        assert all(name in result.stdout for name in COMMANDS)
    assert min(times) <= 0.5


def test_help_imports_nothing_heavy() -> None:
    program = "import sys\nfrom deepseek.cli.main import main\ntry: main(['--help'])\nfinally: print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "transformers", "typer", "rich", "numpy", "pydantic"} & set(modules)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_without_loading_torch(name: str) -> None:
    program = f"import sys\nfrom deepseek.cli.main import main\nmain([{name!r}, '--help'])"
    command = [sys.executable, "-X", "importtime", "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"deepseek {name}" in result.stdout
    assert " torch\n" not in result.stderr


def test_version(capsys: Capture) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"deepseek {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pul"], ["'pul'", "'pull'"]),
        (["--verison"], ["--verison"]),
        (["pull", "--nmae"], ["--nmae", "deepseek pull --help"]),
        (["pull", "a", "b"], ["b"]),
        (["pull", "smollm-135m"], ["smollm2-135m"]),
        (["pull", "deepseek-175b"], ["no weights are published"]),
        (["pull", "a/b/c"], ["hub id"]),
        (["expert"], ["deepseek expert --help"]),
        (["expert", "inspct"], ["inspect"]),
        (["expert", "train"], ["--from-git"]),
        (["expert", "train", "--from-git", ".", "--layer", "all"], ["--layers"]),
        (["expert", "train", "--from-git", ".", "--epochs", "0"], ["--epochs"]),
        (["expert", "train", "--from-git", ".", "--split", "random"], ["'time'"]),
        (["expert", "inspect", "nothing"], ["'nothing'"]),
        (["expert", "inspect", "nothing/there.safetensors"], ["there.safetensors"]),
        (["expert", "verify", "x", "--base", "nothing"], ["'nothing'"]),
        (["expert", "verify", "x", "--signature", "maybe"], ["'trusted'"]),
        (["expert", "sign", "x"], ["--key"]),
        (["align", "--method", "gprpo"], ["Invalid value for '--method': 'gprpo' is not one of"]),
        (["expert", "keygen", "../key"], ["letters"]),
        (["quantize", "tiny", "--out", "x", "--bits", "3"], ["--bits 3 must be from 4 to 8"]),
        (["quantize", "tiny", "--out", "x", "--bits", "nan"], ["--bits nan must be"]),
    ],
    ids=" ".join,
)
def test_mistakes_exit_2_with_one_sentence(
    arguments: list[str], words: list[str], capsys: Capture
) -> None:
    status = run(*arguments)
    output = capsys.readouterr()
    assert status == 2
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    assert all(word in output.err for word in words), output.err


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ConfigError("a is b; write c."), 2, "error: a is b; write c."),
        (
            OSError(28, "No space left on device", "/data/x"),
            2,
            "error: /data/x: No space left on device.",
        ),
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            KeyboardInterrupt("stopped at step 7; the same call resumes the run"),
            130,
            "stopped at step 7; the same call resumes the run: deepseek fake",
        ),
        (
            RuntimeError("odd"),
            1,
            "error: unexpected RuntimeError (odd); run it again with --debug for the traceback",
        ),
    ],
)
def test_errors_have_one_way_out(
    error: BaseException, status: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    install(monkeypatch, error)
    assert run("fake") == status
    assert capsys.readouterr().err.splitlines()[-1] == line


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    install(monkeypatch, ConfigError("a is b."))
    assert run("fake", "--debug") == 2
    assert "Traceback" in capsys.readouterr().err


def test_debug_after_two_dashes_belongs_to_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    install(monkeypatch, ConfigError("a is b."))
    assert run("fake", "--", "--debug") == 2
    assert "Traceback" not in capsys.readouterr().err


def test_ctrl_c_ends_with_130(tmp_path: Path) -> None:
    program = (
        "import signal, sys, time, types, typer\nfrom deepseek.cli import main as m\napp = typer.Typer()\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in background jobs
        "@app.command()\ndef wait() -> None:\n    print('ready', flush=True)\n    time.sleep(60)\n"
        f"sys.modules[{FAKE!r}] = types.SimpleNamespace(app=app)\nm.COMMANDS['wait'] = ('fake:app', '')\n"
        "m.main(['wait'])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.split() == ["interrupted"]


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m deepseek --help | head -c 1; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in result.stderr
    assert "Exception" not in result.stderr


def test_every_command_is_a_function_or_a_typer_application() -> None:
    for place, summary in COMMANDS.values():
        module, _, name = place.partition(":")
        found = getattr(import_module(f"deepseek.cli.{module}"), name)
        assert isinstance(found, FunctionType | typer.Typer)
        assert summary.endswith(".")


@pytest.mark.parametrize("words", [["expert"], ["expert", "lock"], ["pull"]])
def test_help_names_the_command_that_it_is_about(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    shown = []
    for arguments in (["help", *words], [*words, "--help"]):
        with pytest.raises(SystemExit, match="0"):
            main(arguments)
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]


@pytest.mark.parametrize(
    ("command", "before", "after"),
    [("expert", None, "PASSIVE"), ("expert", "ACTIVE", "ACTIVE"), ("runs", None, None)],
)
def test_commands_that_train_let_waiting_threads_sleep(
    command: str, before: str | None, after: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", before or "")
    if before is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert os.environ.get("OMP_WAIT_POLICY") == after
