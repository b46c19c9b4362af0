"""`benchmarks/gpu.py` runs on any device; here on the CPU, with a tiny model."""

import json
import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_it_measures_both_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "gpu.json"
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    words = ["benchmarks/gpu.py", "--device", "cpu", "--dtype", "float32", "--quick"]
    monkeypatch.setattr(sys, "argv", [*words, "--json", str(path)])
    runpy.run_path(str(BENCHMARKS / "gpu.py"), run_name="__main__")
    record = json.loads(path.read_text())
    assert record["commit"]
    figures = record["figures"]["tiny"]
    sides = [figures[name] for name in ("one_stream", "3_streams", "prefill")]
    assert all(value > 0 for side in sides for value in side.values())
    assert figures["training_tokens_per_s"] > 0
    assert figures["plug_ms"] > 0
