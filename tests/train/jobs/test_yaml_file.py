"""YAML whose tags lie about their values."""

from pathlib import Path

import pytest

from deepseek.errors import ConfigError
from deepseek.train.jobs.yaml_file import read_file


@pytest.mark.parametrize(
    "text", ["a: !!timestamp x", "a: !!int x", "a: !!binary é", "a: !!float x", "a: 2001-99-99"]
)
def test_a_tag_that_does_not_fit_its_value_is_one_sentence(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        read_file(path)
