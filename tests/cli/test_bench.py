"""`deepseek bench` lists the measurements and hands their options on."""

import pytest

from deepseek.cli import bench
from deepseek.cli.bench import ALIASES, FOLDER, measurements
from deepseek.cli.main import main


def run(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as stop:
        main(["bench", *arguments])
    return stop.value.code


def test_every_alias_names_a_measurement() -> None:
    assert {f"{name}.py" for name in ALIASES.values()} <= {file.name for file in FOLDER.glob("*.py")}
    assert set(ALIASES) <= set(measurements())
    assert "results" not in measurements()


def test_measurements_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in measurements())


def test_options_are_handed_on(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("preferences", "--help") == 0
    assert "--save" in capfd.readouterr().out


def test_a_misspelt_name_is_answered(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("atention") == 2
    assert "'attention'" in capsys.readouterr().err


def test_without_a_checkout_it_says_what_is_needed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    assert run("attention") == 2
    assert "clone" in capsys.readouterr().err
