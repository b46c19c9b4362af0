"""`deepseek models`: list models, and remove them after a question and a warning."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek.checkpoint.models import remove_model, stored_model
from deepseek.cli import confirm
from deepseek.cli.main import main
from deepseek.cli.processes import processes_at

Capture = pytest.CaptureFixture[str]


def run(capsys: Capture, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(["models", *arguments])
    output = capsys.readouterr()
    assert isinstance(stop.value.code, int)
    return stop.value.code, output.out, output.err


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model in the library's home, with an unfinished run on it."""
    monkeypatch.setenv("DEEPSEEK_HOME", str(tmp_path))
    folder = tmp_path / "models" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (folder / "model.safetensors").write_bytes(b"0" * 3_000_000)
    begun = tmp_path / "runs" / "half"
    begun.mkdir(parents=True)
    (begun / "request.json").write_text(json.dumps({"base": "tiny"}))
    return folder


def test_the_list_names_size_and_class(model: Path, capsys: Capture) -> None:
    status, out, _ = run(capsys, "list")
    assert status == 0
    assert out.startswith("tiny")
    assert "3.0 MB" in out
    assert "LlamaForCausalLM" in out


def test_an_empty_list_says_how_to_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("DEEPSEEK_HOME", str(tmp_path))
    assert "deepseek pull" in run(capsys, "list")[1]


def test_without_a_terminal_it_needs_yes(model: Path, capsys: Capture) -> None:
    status, _, err = run(capsys, "rm", "tiny")
    assert status == 2
    assert "--yes" in err
    assert "the run half is unfinished" in err
    assert model.is_dir()


def test_yes_removes_and_says_what_used_it(model: Path, capsys: Capture) -> None:
    status, out, err = run(capsys, "rm", "tiny", "--yes")
    assert status == 0
    assert "removed" in out
    assert "the run half is unfinished" in err
    assert not model.exists()
    assert run(capsys, "list")[1].startswith("no models")


@pytest.mark.parametrize(("answer", "removed"), [("y", True), ("n", False)])
def test_the_question_is_obeyed(
    answer: str, removed: bool, model: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(confirm.sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(confirm.typer, "confirm", lambda *_, **__: answer == "y")
    assert run(capsys, "rm", "tiny")[0] == (0 if removed else 1)
    assert model.exists() != removed


@pytest.mark.parametrize("name", ["tyni", "../models/tiny", ".", ""])
def test_other_names_are_refused(name: str, model: Path, capsys: Capture) -> None:
    status, _, err = run(capsys, "rm", name, "--yes")
    assert (status, model.is_dir()) == (2, True)
    assert "There is no model" in err


def test_a_linked_folder_loses_only_the_link(model: Path, tmp_path: Path) -> None:
    model.rename(tmp_path / "elsewhere")
    model.symlink_to(tmp_path / "elsewhere")
    remove_model(stored_model("tiny"))
    assert not model.exists()
    assert (tmp_path / "elsewhere" / "config.json").is_file()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_that_has_it_open_is_named(model: Path) -> None:
    program = (
        f"file = open({str(model / 'model.safetensors')!r}, 'rb'); print(1, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert any(use.startswith(f"{process.pid} ") for use in processes_at(model))
        process.communicate("\n")
    assert processes_at(model) == []
