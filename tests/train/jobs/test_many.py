"""Experts trained side by side are those that are trained alone, and one that fails stops no
other.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from deepseek.cli.main import main
from deepseek.errors import ConfigError, DataError
from deepseek.packs.pack import read_pack
from deepseek.train.jobs.expert import train_expert
from deepseek.train.jobs.many import estimate_all, train_all

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


def test_a_dry_run_estimates_each_expert_without_ray(
    tiny_base: Path, text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experts = {
        name: {
            **DIALS,
            "from_folder": str(text_folder),
            "out": str(tmp_path / f"{name}.pack"),
            "run_folder": str(tmp_path / name),
        }
        for name in ("one", "two")
    }
    file = tmp_path / "experts.json"
    file.write_text(json.dumps({"base": str(tiny_base), "experts": experts}))
    experts_file = file.rename(file.with_suffix(".yaml"))  # JSON is YAML
    with pytest.raises(SystemExit) as stop:
        main(["expert", "train-all", str(experts_file), "--dry-run"])
    output = capsys.readouterr()
    assert (stop.value.code or 0, output.out) == (0, "")
    assert output.err.count("memory") == 2
    assert output.err.index("one:") < output.err.index("two:")
    assert [path.name for path in tmp_path.iterdir()] == ["experts.yaml"]
    del experts["two"]["from_folder"]
    with pytest.raises(DataError, match=r"experts\.two: No text is given"):
        estimate_all({"base": str(tiny_base), "experts": experts})


def test_a_file_without_experts_is_refused() -> None:
    with pytest.raises(ConfigError, match="experts: "):
        next(train_all({"experts": {}}))
