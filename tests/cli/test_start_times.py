"""Commands that need no model load none of the libraries that take seconds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {"datasets", "matplotlib", "numba", "pyarrow", "sklearn", "torch", "transformers"}

LIGHT = [
    "bench",
    "bench --json",
    "claims",
    "claims --json",
    "claims show dpe",
    "expert list",
    "expert list --json",
    "models list",
    "models list --json",
    "plan",
    "plan --inference --json",
    "plan --profile small",
    "prefs search",
    "prefs stats",
    "prefs stats --json",
    "runs list",
    "runs list --json",
]


@pytest.mark.parametrize("command", LIGHT)
def test_no_heavy_library_is_loaded(command: str, tmp_path: Path) -> None:
    program = (
        "import sys\nfrom deepseek.cli.main import main\n"
        "try: main(sys.argv[1:])\nfinally: print(*sys.modules, file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, *command.split()],
        env=os.environ | {"DEEPSEEK_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert HEAVY & set(result.stderr.split()) == set()
