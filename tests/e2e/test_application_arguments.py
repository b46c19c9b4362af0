"""On wrong input, an application ends with one sentence and exit code 2 before it trains or deletes
anything.
"""

import os
import sys
import time
from http.client import RemoteDisconnected
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from deepseek.errors import DataError

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


def test_the_file_that_is_left_for_the_update_is_one_that_training_reads(texts: Path) -> None:
    (texts / "part").mkdir()
    (texts / "part" / "newest.md").write_text("text\n")
    os.utime(texts / "part" / "newest.md", (2e9, 2e9))
    (texts / ".git").mkdir()
    for name in (".git/FETCH_HEAD", "image.png", "empty.txt"):
        (texts / name).write_bytes(b"\x00" if name == "image.png" else b"")
        os.utime(texts / name, (3e9, 3e9))
    (texts / "link.txt").symlink_to("/nonexistent")
    newest, copied = application("team_server").without_newest(texts, "one")
    assert newest == Path("part/newest.md")
    assert sorted(path.name for path in copied.rglob("*")) == ["0.txt", "1.txt", "2.txt"]


def test_a_team_asks_no_longer_when_its_block_fails() -> None:
    def post(*_: object) -> None:
        raise RemoteDisconnected

    asking = application("team_server").Asking(SimpleNamespace(post=post), ["passage"])
    with pytest.raises(DataError), asking:
        while not asking.failures:
            time.sleep(0.001)
        raise DataError("The changes hold no new text.")
    assert not asking._thread.is_alive()


def test_home_may_stand_behind_a_name(monkeypatch: pytest.MonkeyPatch, texts: Path) -> None:
    monkeypatch.setenv("HOME", str(texts.parent))
    assert application("serving").named_folder(f"one=~/{texts.name}") == ("one", texts)
