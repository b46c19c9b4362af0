"""`deepseek serve`: what is wrong with its options stops it before anything listens."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.cli.main import main
from deepseek.cli.serve import _keys
from deepseek.errors import ConfigError


@pytest.fixture(autouse=True)
def no_keys_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEEPSEEK_API_KEY", raising=False)
    monkeypatch.delenv("DEEPSEEK_ADMIN_KEY", raising=False)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return what `deepseek serve ARGUMENTS` says when it refuses to start."""
    with pytest.raises(SystemExit) as stop:
        main(["serve", *arguments])
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("option", ["--api-key-file", "--admin-key-file"])
@pytest.mark.parametrize("content", [b"", b"\n  \n", b"# key: comes tomorrow\n", b"\xff\xfe"])
def test_a_key_file_without_a_key_stops_the_start(
    option: str, content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To go on without keys would make everybody an admin."""
    file = tmp_path / "keys"
    file.write_bytes(content)
    said = refused(capsys, option, str(file))
    assert option in said
    assert option in refused(capsys, option, str(tmp_path / "missing"))
    assert option in refused(capsys, option, str(tmp_path))


@pytest.mark.parametrize("option", ["--teach-root", "--experts-folder"])
def test_a_folder_that_does_not_exist_stops_the_start(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert option in refused(capsys, option, str(tmp_path / "missing"))
    (tmp_path / "file").write_text("text")
    assert option in refused(capsys, option, str(tmp_path / "file"))


@given(
    st.lists(
        st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1), max_size=8
    )
)
def test_a_file_gives_its_lines_as_keys_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str]
) -> None:
    file = tmp_path_factory.mktemp("keys") / "file"
    file.write_text("\n".join(lines), encoding="utf-8")
    wanted = {line for line in lines if not line.startswith("#")}
    if wanted:
        assert _keys(file, "UNSET", "--api-key-file") == wanted
    else:
        with pytest.raises(ConfigError):
            _keys(file, "UNSET", "--api-key-file")


def test_keys_of_the_environment_are_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("one\n# two\nthree\n")
    monkeypatch.setenv("DEEPSEEK_API_KEY", " four ")
    assert _keys(tmp_path / "file", "DEEPSEEK_API_KEY", "--api-key-file") == {
        "one",
        "three",
        "four",
    }
    assert _keys(None, "DEEPSEEK_API_KEY", "--api-key-file") == {"four"}
