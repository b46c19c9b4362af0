"""`deepseek serve`: what is wrong with its options stops it before anything listens."""

from pathlib import Path

import pytest

from deepseek.cli.main import main


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


@pytest.mark.parametrize(
    ("option", "content", "reason"),
    [
        ("--api-key-file", "secret shop\nsecret german\n", "line 2: this key has other experts"),
        ("--api-key-file", "secret ../shop\n", "line 1: '../shop' is no name of an expert"),
        ("--admin-key-file", "secret shop\n", "administrators may use all"),
    ],
)
def test_an_unclear_key_file_is_refused_in_one_sentence(
    option: str, content: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys"
    file.write_text(content)
    said = refused(capsys, option, str(file))
    assert reason in said
    assert said.count("\n") == 1
    assert "secret" not in said


def test_a_key_with_experts_cannot_be_an_administrators(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    users = tmp_path / "users"
    users.write_text("secret shop\n")
    admins = tmp_path / "admins"
    admins.write_text("secret\n")
    said = refused(capsys, "--api-key-file", str(users), "--admin-key-file", str(admins))
    assert "give each key once" in said
    assert "secret" not in said
