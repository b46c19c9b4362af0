"""`deepseek export` shows no warnings of the libraries that it uses."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_an_export_to_onnx_says_nothing_of_other_libraries(
    base_folder: Path, tmp_path: Path
) -> None:
    for library in ("onnxruntime", "onnxscript"):
        pytest.importorskip(library)
    result = subprocess.run(
        [sys.executable, "-m", "deepseek", "export", base_folder, tmp_path / "out", "--to", "onnx"],
        env=os.environ | {"DEEPSEEK_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "torchvision" not in result.stderr
