"""`deepseek serve`: wrong options stop it before it listens."""

import socket
from pathlib import Path

import pytest

from deepseek.cli.main import main
from deepseek.errors import PackError
from deepseek.server import run
from deepseek.server.settings import Settings


@pytest.fixture(autouse=True)
def no_keys_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEEPSEEK_API_KEY", raising=False)
    monkeypatch.delenv("DEEPSEEK_ADMIN_KEY", raising=False)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the message with which `deepseek serve ARGUMENTS` refuses to start."""
    with pytest.raises(SystemExit) as stop:
        main(["serve", *arguments])
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("option", ["--api-key-file", "--admin-key-file"])
@pytest.mark.parametrize("content", [b"", b"\n  \n", b"# key: comes tomorrow\n", b"\xff\xfe"])
def test_a_key_file_without_a_key_stops_the_start(
    option: str, content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without keys, everybody would be an admin."""
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


def test_a_wrong_address_or_device_is_refused_before_the_experts_are_looked_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look-up may download and hash the base, which can take minutes."""
    monkeypatch.setattr(
        "deepseek.packs.library.packs_for", lambda *_: pytest.fail("they are looked up")
    )
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert "is taken" in refused(capsys, str(tmp_path), "--port", port)
    assert "key is needed" in refused(capsys, str(tmp_path), "--host", "0.0.0.0")
    assert "Device cuda" in refused(capsys, str(tmp_path), "--device", "cuda:99")


def test_experts_are_looked_up_while_the_server_listens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packs that are left out are still named."""
    plugged: list[object] = []

    def start(*_: object, experts: object, **__: object) -> None:
        plugged.append(experts)
        raise PackError("enough.")

    monkeypatch.setattr(run, "start_engine", start)
    monkeypatch.setattr(
        "deepseek.packs.library.packs_for",
        lambda *_: ({"one": tmp_path / "one.safetensors"}, ["two is left out"]),
    )
    assert "warning: two is left out" in refused(capsys, str(tmp_path), "--port", "0")
    assert plugged == [["one"]]


def test_paths_below_the_home_are_found_as_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shells leave the tilde of `--option=~/x` to the program."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("packs", "texts"):
        (tmp_path / name).mkdir()
    for name in ("user", "admin"):
        (tmp_path / f"{name}-keys").write_text(f"{name}-{'k' * 40}\n")
    started: list[Settings] = []
    monkeypatch.setattr(run, "serve", lambda *_, settings, **__: started.append(settings))
    options = ("experts-folder=~/packs", "teach-root=~/texts", "api-key-file=~/user-keys")
    with pytest.raises(SystemExit) as stop:
        main(["serve", *(f"--{option}" for option in options), "--admin-key-file=~/admin-keys"])
    assert stop.value.code == 0
    (settings,) = started
    assert (settings.experts_folder, settings.teach_root) == (
        tmp_path / "packs",
        tmp_path / "texts",
    )
    assert settings.api_keys == {f"user-{'k' * 40}"}
    assert settings.admin_keys == {f"admin-{'k' * 40}"}
