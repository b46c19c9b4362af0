"""Every example runs, and is short enough to read."""

import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from processes import run

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path: Path, smollm2: Path) -> None:
    assert len(path.read_text().splitlines()) < 60
    environment = {**os.environ, "DEEPSEEK_HOME": str(smollm2.parents[1])}
    result = run([sys.executable, path], env=environment, timeout=1_800)
    assert result.returncode == 0, result.stderr
    assert result.stdout


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(
    smollm2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPSEEK_HOME", str(smollm2.parents[1]))
    path = EXAMPLES[0].with_name("tour.ipynb")
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs for cell in code), "outputs are those of one machine: clear them"
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": path.parent}}).execute()
    printed = ["".join(output.get("text", "") for output in cell.outputs) for cell in code]
    assert "held-out loss" in printed[1]
    assert printed[-1].strip() == "same bits: True"
