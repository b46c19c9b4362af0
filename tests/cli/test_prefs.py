"""What `deepseek prefs` prints."""

from pathlib import Path

import pytest

from deepseek.cli.main import main


@pytest.mark.parametrize(
    ("words", "told"), [([], "there are no pairs"), (["soup"], "no pair has these words")]
)
def test_a_search_without_a_result_says_so(
    words: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["prefs", "search", *words, "--database", str(tmp_path / "prefs.db")])
    out, err = capsys.readouterr()
    assert (stop.value.code or 0, out, err.strip()) == (0, "", told)
