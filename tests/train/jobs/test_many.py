"""Experts trained side by side are those that are trained alone, and one that fails stops no
other.
"""

from pathlib import Path
from typing import Any

import pytest

from deepseek.errors import ConfigError, DataError
from deepseek.packs.pack import read_pack
from deepseek.train.jobs.expert import train_expert
from deepseek.train.jobs.many import train_all

DIALS: dict[str, Any] = {
    "layers": "last:1",
    "width": 24,
    "tokens": 3000,
    "epochs": 1,
    "row_length": 32,
    "held_out_tokens": 400,
}


@pytest.mark.slow
def test_experts_come_as_they_are_ready(tiny_base: Path, text_folder: Path, tmp_path: Path) -> None:
    def given(name: str, text: Path) -> dict[str, Any]:
        return {
            **DIALS,
            "from_folder": str(text),
            "out": str(tmp_path / f"{name}.pack"),
            "run_folder": str(tmp_path / name),
        }

    empty = tmp_path / "empty"
    empty.mkdir()
    experts = {
        "one": given("one", text_folder),
        "two": given("two", text_folder),
        "hollow": given("hollow", empty),
    }
    results = dict(train_all({"base": str(tiny_base), "experts": experts}))
    assert isinstance(results["hollow"], DataError) and "no usable text files" in str(
        results["hollow"]
    )
    alone = train_expert(
        str(tiny_base), **{**given("alone", text_folder), "name": "one", "quiet": True}
    )
    (one, two), by_itself = (
        (read_pack(Path(str(results[name]))) for name in ("one", "two")),
        read_pack(alone),
    )
    assert one.manifest.metrics == by_itself.manifest.metrics == two.manifest.metrics


def test_a_file_without_experts_is_refused() -> None:
    with pytest.raises(ConfigError, match="experts: "):
        next(train_all({"experts": {}}))
