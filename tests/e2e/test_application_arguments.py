"""Wrong input ends an application with one sentence and exit code 2, before anything is trained or
deleted.
"""

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

APPLICATIONS = Path(__file__).parents[2] / "examples" / "applications"


@pytest.fixture(autouse=True)
def modules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(APPLICATIONS))
    monkeypatch.setenv("DEEPSEEK_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("deepseek.train_expert", lambda *_, **__: pytest.fail("training began"))


def application(name: str) -> ModuleType:
    return import_module(name)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.txt").write_text("text\n")
    return folder


@pytest.mark.parametrize(
    ("name", "words", "complaint"),
    [
        ("code_assistant", ["--cases", "0"], "0 is too few"),
        ("code_assistant", ["--json", "{empty}"], "it is a folder"),
        ("support", ["german=missing"], "is not NAME=FOLDER"),
        ("support", ["shop={texts}"], "english, german, spanish"),
        ("team_server", ["one={texts}"], "at least two sources"),
        ("team_server", ["one={texts}", "one={texts}"], "each with a name of its own"),
        ("team_server", ["../models={texts}", "two={texts}"], "'../models' is no name"),
        ("team_server", ["one={empty}", "two={texts}"], "holds 0 files"),
    ],
)
def test_wrong_input_is_told(
    name: str,
    words: list[str],
    complaint: str,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    filled = [word.format(texts=texts, empty=empty) for word in words]
    monkeypatch.setattr(sys, "argv", [name, *filled])
    with pytest.raises(SystemExit, match=r"^2$"):
        application("serving").run(application(name).main)
    assert complaint in capsys.readouterr().err.splitlines()[-1]


def test_home_may_stand_behind_a_name(monkeypatch: pytest.MonkeyPatch, texts: Path) -> None:
    monkeypatch.setenv("HOME", str(texts.parent))
    assert application("serving").named_folder(f"one=~/{texts.name}") == ("one", texts)
