"""An output path that cannot be written is refused before anything is read or computed."""

import json
from pathlib import Path
from typing import NoReturn

import pytest

from deepseek.cli.main import main
from deepseek.data.preferences import database
from deepseek.export import export, gguf, quantize

COMMANDS = (
    "quantize BASE --out OUT",
    "export BASE OUT --to hf",
    "export BASE OUT --to onnx",
    "export BASE OUT.gguf --to gguf",
    "data code TEXT OUT.jsonl",
    "data questions --out OUT.jsonl --from-folder TEXT",
    "data mathematics OUT.jsonl --count 1000000000",
    "inspect attention OUT.png --base BASE",
    "prefs export OUT.jsonl --database TEXT/prefs.db",
    "prefs export OUT.parquet --database TEXT/prefs.db",
)


@pytest.mark.parametrize("source", ["HOME/own.jsonl", "~/own.jsonl", "~/link.jsonl"])
def test_the_source_of_questions_is_not_written_over(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "own.jsonl"
    text = "# Install it\n\nRun the tool with `--fast` to install it within ten minutes.\n"
    content = json.dumps({"text": text}) + "\n"
    file.write_text(content)
    (tmp_path / "link.jsonl").symlink_to(file)
    source = source.replace("HOME", str(tmp_path))
    with pytest.raises(SystemExit) as stop:
        main(["data", "questions", f"--from-jsonl={source}", "--out=~/own.jsonl"])
    assert stop.value.code == 2
    assert "is the file to read; choose another name." in capsys.readouterr().err
    assert file.read_text() == content


@pytest.mark.parametrize(
    "command", ["eval none --data nosuch", "inspect attention --base BASE --data nosuch"]
)
def test_a_text_that_is_not_there_is_named_before_a_model_is_loaded(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("deepseek.engine.load.load", too_early)
    monkeypatch.setattr("deepseek.checkpoint.hub.resolve", too_early)
    with pytest.raises(SystemExit) as stop:
        main(command.split())
    assert (stop.value.code, capsys.readouterr().err) == (
        2,
        "error: nosuch does not exist; check the path.\n",
    )


def too_early(*_: object, **__: object) -> NoReturn:
    raise AssertionError("the path comes first")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("place", ["file/below", "file/far/below"])
def test_it_is_the_first_thing_checked(
    command: str,
    place: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("a file")
    text = tmp_path / "text"
    text.mkdir()
    (text / "one.py").write_text("def one():\n    'Return one.'\n    return 1\n")
    for module, name in ((export, "load"), (quantize, "load_stored"), (gguf, "resolve")):
        monkeypatch.setattr(module, name, too_early)
    monkeypatch.setattr("deepseek.data.clean", too_early)
    monkeypatch.setattr(database.PreferenceDatabase, "pairs", too_early)
    words = command.replace("OUT", str(tmp_path / place)).replace("TEXT", str(text)).split()
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert "lies below a file; choose another path." in printed, printed
    assert len(printed.splitlines()) == 1
    assert (tmp_path / "file").read_text() == "a file"
