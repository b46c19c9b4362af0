"""The quick command of every claim's benchmark runs with tiny models and writes its result
(`benchmarks/claims.yaml`, `benchmarks/quick_home.py`).
"""

import json
import os
import sys
from pathlib import Path

import processes
import pytest

from deepseek.claims.declaration import CHECKOUT, read_declaration
from deepseek.claims.runs import Places

DECLARED = read_declaration(CHECKOUT)
QUICK = [name for name, one in DECLARED.results.items() if one.quick]
WITHOUT = {
    "adapt_bodies_gemma": "adapt_bodies with another base",
    "against_documents": "against with other sources",
    "attention_scaling_bf16_amd": "attention_scaling_bf16 on another machine",
    "compiled_kinds_gemma": "compiled_kinds with the weights of gemma3-270m",
    "decode_avx2": "decode on a processor that is imitated",
    "int8_quality_gemma": "int8_quality with the weights of gemma3-270m",
    "lora_curve_gemma": "lora_curve with another base and less text",
    "scale_1.2b": "scale_8b with another shape",
}
"""Results without a quick command."""


def run(words: list[str], home: Path) -> None:
    environment = os.environ | {"DEEPSEEK_HOME": str(home)}
    done = processes.run([sys.executable, *words], cwd=CHECKOUT, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.fixture(scope="module")
def quick_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with tiny models and texts under the names that benchmarks expect."""
    folder = tmp_path_factory.mktemp("quick")
    run(["benchmarks/quick_home.py", str(folder)], folder)
    return folder


def test_every_result_has_a_quick_command_or_a_reason() -> None:
    assert set(QUICK) | WITHOUT.keys() == set(DECLARED.results)
    assert not set(QUICK) & WITHOUT.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_the_quick_command_writes_its_result(name: str, quick_home: Path) -> None:
    places = Places.below(quick_home)
    run(places.filled_in(DECLARED.results[name].quick, name), quick_home)
    record = json.loads((places.results / f"{name}.json").read_text())
    assert {"machine", "threads", "commit", "command", "date"} <= record.keys()
    assert record["command"].startswith("python benchmarks/")


@pytest.mark.slow
def test_a_part_of_hash_recall_writes_all_rivals(quick_home: Path) -> None:
    """No claim uses its result, so `claims.yaml` has no quick command for it."""
    result = quick_home / "hash_recall.json"
    part = ["--layers", "1", "--lengths", "4096", "--queries", "4", "--indexer-steps", "4"]
    run(["benchmarks/hash_recall.py", *part, "--json", str(result)], quick_home)
    record = json.loads(result.read_text())
    ways = record["figures"]["4096"]
    assert {"local", "distilled", "indexer", "indexer per group", "best"} <= ways.keys()
    assert ways["indexer"]["keys"] == ways["best"]["keys"] == 512
    cost = record["multiply_adds"]["4096"]
    assert cost["hash"] < cost["indexer"]
