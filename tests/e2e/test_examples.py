"""Every example runs, and is short enough to read."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path: Path, smollm2: Path) -> None:
    assert len(path.read_text().splitlines()) < 60
    environment = {**os.environ, "DEEPSEEK_HOME": str(smollm2.parents[1])}
    result = subprocess.run(
        [sys.executable, path], capture_output=True, text=True, env=environment, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout
