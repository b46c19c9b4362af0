"""Ctrl-C, Ctrl-D and closed pipes end every command with the exit status that shells expect."""

import contextlib
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer

from deepseek.cli import main as command_line
from deepseek.cli.interrupts import INTERRUPTS
from deepseek.cli.session import ChatSession
from deepseek.errors import ConfigError

Capture = pytest.CaptureFixture[str]


def fake(error: BaseException, interrupt: bool) -> typer.Typer:
    """Return a command that fails with `error`; with `interrupt`, after it lost an interrupt."""
    app = typer.Typer()

    @app.command()
    def lose() -> None:
        if interrupt:
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                signal.pause()
        raise error

    return app


@pytest.mark.parametrize(
    ("error", "interrupt", "status", "told"),
    [
        (ModuleNotFoundError("No module named 'x'"), True, 130, "interrupted"),
        (ModuleNotFoundError("No module named 'x'"), False, 1, "unexpected ModuleNotFoundError"),
        (ConfigError("a is b; write c."), True, 2, "error: a is b; write c."),
    ],
)
def test_an_import_that_ctrl_c_cut_short_is_no_bug(
    error: BaseException,
    interrupt: bool,
    status: int,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    # In background jobs the signal is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    module = SimpleNamespace(app=fake(error, interrupt))
    monkeypatch.setitem(sys.modules, "deepseek.cli.fake", module)  # type: ignore[misc]
    monkeypatch.setitem(command_line.COMMANDS, "fake", ("fake:app", ""))
    try:
        with pytest.raises(SystemExit) as stop:
            command_line.main(["fake"])
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert stop.value.code == status
    assert told in capsys.readouterr().err
    assert not INTERRUPTS.noted


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        INTERRUPTS.watch()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_chat_that_goes_on_has_answered_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop() -> list[object]:
        raise KeyboardInterrupt

    printed: list[object] = []
    session = ChatSession.__new__(ChatSession)
    session.console = SimpleNamespace(print=printed.append)  # type: ignore[assignment]
    session.commands = {"/stop": lambda _: stop()}  # type: ignore[dict-item,return-value]
    monkeypatch.setattr(INTERRUPTS, "noted", True)
    session._turn("/stop")
    assert "stopped" in str(printed) and not INTERRUPTS.noted


@pytest.mark.parametrize("key", [b"\x03", b"\x04"], ids=["ctrl-c", "ctrl-d"])
def test_a_question_that_is_not_answered_changes_nothing(key: bytes, tmp_path: Path) -> None:
    model = tmp_path / "models" / "tiny"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    terminal, inner = pty.openpty()
    program = (
        "import fcntl, signal, termios; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
        "from deepseek.cli.main import main; main(['models', 'rm', 'tiny'])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=inner,
        stderr=subprocess.PIPE,
        env=os.environ | {"DEEPSEEK_HOME": str(tmp_path)},
        start_new_session=True,
    )
    assert process.stderr is not None
    told = b""
    while b"[y/N]" not in told:
        piece = os.read(process.stderr.fileno(), 1000)
        assert piece, told
        told += piece
    status = None
    while status is None:
        # A signal just before the blocking read takes effect only at the next one, so the key is
        # pressed again, as a person would.
        os.write(terminal, key)
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = process.wait(timeout=5)
    told += process.stderr.read()
    assert status == 130
    assert told.splitlines()[-1] == b"interrupted"
    assert model.is_dir()
    process.stderr.close()
    os.close(terminal)
    os.close(inner)


@pytest.mark.parametrize("words", ["plan", "claims", "expert train --help", "claims show params"])
def test_what_nobody_reads_ends_as_sigpipe_would(words: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        [sys.executable, "-m", "deepseek", *words.split()],
        stdout=writer,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, b"")
