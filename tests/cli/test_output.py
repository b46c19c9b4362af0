"""Closed, full and strictly encoded output streams, and escape codes in output."""

import subprocess
import sys
from io import StringIO
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import typer
from rich.console import Console

from deepseek.checkpoint.store import home, write_json
from deepseek.cli.main import COMMANDS, main
from deepseek.cli.output import echo, plain
from deepseek.cli.session import ChatSession
from deepseek.cli.speak import Palette, legend, speak
from deepseek.engine.sampler import Sampling
from deepseek.errors import DataError
from deepseek.train.loop.progress import ProgressBar

ESCAPE = "\x1b]0;owned\x07\x9b31m\r\u202e"
"""Sets a terminal's title, changes its colour, and reverses the writing direction."""

Capture = pytest.CaptureFixture[str]


def shell(command: str) -> subprocess.CompletedProcess[str]:
    """Run a command line in a shell in which `deepseek` is this checkout's."""
    program = f'deepseek() {{ {sys.executable} -m deepseek "$@"; }}; {command}'
    return subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("deepseek --help >&-", 0),
        ("deepseek --help >&- 2>&- <&-", 0),
        ("deepseek pul 2>&-", 2),
        ("deepseek --help > /dev/full", 2),
        ("deepseek pul 2> /dev/full", 2),
        ("deepseek bench --help | true; (exit ${PIPESTATUS[0]})", None),
        ("deepseek --help | head -c 1 > /dev/null; (exit ${PIPESTATUS[0]})", None),
        ("deepseek pul 2>&1 >/dev/null | true; (exit ${PIPESTATUS[0]})", 2),
    ],
)
def test_streams_that_nobody_reads_end_quietly(command: str, status: int | None) -> None:
    result = shell(command)
    assert "Traceback" not in result.stderr and "Exception" not in result.stderr
    assert result.returncode == status if status is not None else result.returncode in (0, 141)


def test_a_job_goes_on_when_nobody_reads_its_progress() -> None:
    class Gone(StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

        def isatty(self) -> bool:
            return False

    with ProgressBar(Gone()) as progress:
        for step in range(3):
            progress(step, 3, "train")
            progress.say("a line")


def test_echo_and_errors_write_escape_codes_out(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def fake() -> None:
        echo(f"name {ESCAPE}")
        raise DataError(f"{ESCAPE} is wrong\n.")

    module = ModuleType("deepseek.cli.fake")
    module.app = typer.Typer()  # type: ignore[attr-defined]
    module.app.command()(fake)
    monkeypatch.setitem(sys.modules, "deepseek.cli.fake", module)
    monkeypatch.setitem(COMMANDS, "fake", ("fake:app", "Fails."))
    for debug in ([], ["--debug"]):
        with pytest.raises(SystemExit):
            main(["fake", *debug])
        output = capsys.readouterr()
        assert not {*ESCAPE} & set("\x1b\x07\x9b\r\u202e") & {*(output.out + output.err)}
        assert output.err.splitlines()[-1].startswith("error: \\x1b]0;owned\\x07")


def spoken(*texts: str) -> tuple[Any, Console, StringIO]:
    """Return an engine that generates `texts`, and a console with its output."""
    events = [SimpleNamespace(text=text, expert="poems", error=None) for text in texts]
    info = SimpleNamespace(
        name="poems", armed=True, verdict="better", num_bytes=1, domain=f"[red]{ESCAPE}[/x]"
    )

    class Generation(list[Any]):
        usage = SimpleNamespace(experts={"poems": len(events), None: 1})

        def cancel(self) -> None:
            """Do nothing."""

    engine = SimpleNamespace(
        submit=lambda _: Generation(events), experts=lambda: [info], tokenizer=None
    )
    out = StringIO()
    return engine, Console(file=out, force_terminal=True, color_system=None, width=200), out


def test_what_a_model_writes_cannot_drive_the_terminal() -> None:
    engine, console, out = spoken("two\n", ESCAPE, "[bold]lines")
    text, shares = speak(engine, None, console, Palette())  # type: ignore[arg-type]
    assert text == f"two\n{ESCAPE}[bold]lines", "the conversation holds what the model wrote"
    console.print(legend(shares, Palette()))
    assert "two\n\\x1b]0;owned" in out.getvalue() and "[bold]lines" in out.getvalue()
    assert not set("\x1b\x07\x9b\r\u202e") & {*out.getvalue()}


def test_the_domain_of_a_pack_is_neither_markup_nor_an_escape_code() -> None:
    engine, console, out = spoken()
    session = ChatSession(engine, Sampling(), console)
    session._list("")
    session._turn(f"/{ESCAPE}")
    assert "[red]\\x1b]0;owned" in out.getvalue() and "[/x]" in out.getvalue()
    assert not set("\x1b\x07\x9b\r\u202e") & {*out.getvalue()}


def test_names_of_runs_and_figures_are_written_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("DEEPSEEK_HOME", str(tmp_path))
    for name in ("a", "b[x]", f"evil{ESCAPE}"):
        write_json(
            home() / "runs" / name / "result.json", {"verdict": f"[/y]{ESCAPE}", "after": "x"}
        )
    (home() / "runs" / "spoilt").mkdir()
    (home() / "runs" / "spoilt" / "result.json").write_text("[1]")
    for words in (["list"], ["show", f"evil{ESCAPE}"], ["compare", "b[x]", f"evil{ESCAPE}"]):
        with pytest.raises(SystemExit) as stop:
            main(["runs", *words])
        output = capsys.readouterr()
        assert stop.value.code == 0, output.err
        assert not set("\x1b\x07\x9b\r\u202e") & {*output.out}
        assert words != ["list"] or "damaged" in output.out


def test_a_long_name_of_a_run_stands_apart_from_its_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("DEEPSEEK_HOME", str(tmp_path))
    for name in ("short", "n" * 64):
        write_json(home() / "runs" / name / "result.json", {"held_out_loss": 1.5})
    with pytest.raises(SystemExit, match="0"):
        main(["runs", "list"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[:2] for row in rows] == [["n" * 64, "finished"], ["short", "finished"]]


def test_plain_text_keeps_lines_and_has_no_markup() -> None:
    assert plain("[red]a\nb\x07").plain == "[red]a\nb\\x07"
