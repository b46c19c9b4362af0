"""Output and error messages of `deepseek prefs`."""

import re
from pathlib import Path

import pytest

from deepseek.cli.main import main


def call(*words: str) -> int:
    """Return the exit status of `deepseek prefs WORDS`."""
    with pytest.raises(SystemExit) as stop:
        main(["prefs", *words])
    return int(stop.value.code or 0)


@pytest.fixture
def database(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A database with one pair, in the training split."""
    path = tmp_path / "prefs.db"
    pair = ("--prompt", "Hi", "--chosen", "Hello.", "--rejected", "No.")
    assert call("add", *pair, "--database", str(path)) == 0
    assert call("split", "0", "--database", str(path)) == 0
    capsys.readouterr()
    return path


def test_files_below_the_home_are_found_as_typed(
    database: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert call("export", "~/pairs.jsonl", "--database", "~/prefs.db") == 0
    assert call("import", "~/pairs.jsonl", "--database", "~/prefs.db") == 0
    assert "0 pairs added, 1 already" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [
        "pairs.jsonl",
        database.name,
    ]


@pytest.mark.parametrize(
    ("words", "told"), [([], "there are no pairs"), (["soup"], "no pair has these words")]
)
def test_a_search_without_a_result_says_so(
    words: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("DEEPSEEK_HOME", str(tmp_path))
    code = call("search", *words)
    out, err = capsys.readouterr()
    assert (code, out, err.strip()) == (0, "", told)


@pytest.mark.parametrize("command", ["search", "stats", "split 0.2", "export pairs.jsonl"])
def test_a_mistyped_database_is_refused_and_not_created(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_text("mine\n")
    assert call(*command.split(), "--database", "folder/god.db") == 2
    assert "folder/god.db is not a file; check --database" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]
    assert Path("pairs.jsonl").read_text() == "mine\n"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("search --limit -1", "Invalid value for '--limit'"),
        ("split nan", "SHARE nan must be at least 0 and less than 1."),
        ("split 1", "SHARE 1 must be"),
        ("add --prompt Hi --chosen Yes --rejected No --label=", "--label is empty"),
    ],
)
def test_a_wrong_value_is_told_by_the_name_of_its_option(
    words: str, told: str, database: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*words.split(), "--database", str(database)) == 2
    assert told in capsys.readouterr().err


def test_statistics_say_how_many_labels_they_leave_out(
    database: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = [word for number in range(25) for word in ("--label", f"topic {number}")]
    pair = ("--prompt", "Hi", "--chosen", "Hello!", "--rejected", "What?", *labels)
    assert call("add", *pair, "--database", str(database)) == 0
    assert call("stats", "--database", str(database)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("  label   topic") for line in lines) == 20
    assert lines[-1] == "  label   and 5 more, which --json lists"


def test_an_export_without_pairs_leaves_the_file(
    database: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text("mine\n")
    assert call("export", str(file), "--split", "eval", "--database", str(database)) == 2
    assert "holds no pairs in the split eval" in capsys.readouterr().err
    assert file.read_text() == "mine\n"
    assert call("export", str(file), "--database", str(database)) == 0
    assert file.read_text().count("\n") == 1 and "Hello." in file.read_text()


def test_an_export_of_another_ending_is_refused(
    database: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("export", str(tmp_path / "out.txt"), "--database", str(database)) == 2
    assert "ends neither with .jsonl nor with .parquet" in capsys.readouterr().err
    assert not (tmp_path / "out.txt").exists()


def test_an_estimate_of_sampled_pairs_makes_no_database(
    base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, database = tmp_path / "prompts.jsonl", tmp_path / "prefs.db"
    prompts.write_text('{"prompt": "Hi"}\n' * 20)
    words = ("generate", str(prompts), "--base", str(base_folder), "--judges", "varied")
    words += ("--database", str(database), "--answers", "4", "--max-tokens", "8")
    assert call(*words, "--dry-run") == 0
    told = r"20 x 4 answers \(pairs from the first 8 x 4: \d\), about \d+\.\d minutes on cpu"
    assert re.match(told, capsys.readouterr().out)
    assert not database.exists()
    prompts.write_text("")
    assert call(*words) == 2
    assert "prompts.jsonl holds no prompts; give a file with some." in capsys.readouterr().err
    assert not database.exists()
