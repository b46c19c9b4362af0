"""`deepseek distill-hash`: hashes are written once, and a dry run only estimates them."""

import re
from pathlib import Path

import pytest

from deepseek.cli.main import main
from deepseek.errors import ConfigError
from deepseek.train.jobs.distill_hash import distill_hash


def test_a_dry_run_estimates_and_changes_nothing(
    tiny_base: Path, text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "hash.safetensors"
    words = ["distill-hash", "--base", str(tiny_base), "--data", str(text_folder), "--texts", "1"]
    words += ["--length", "512", "--exact", "1", "--buckets", "4", "--out", str(out)]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        main([*words, "--dry-run"])
    assert stop.value.code in (0, None)
    said = capsys.readouterr().err
    assert re.search(r"\d+ layers on 512 tokens, about \d+\.\d minutes on cpu; memory", said), said
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code in (0, None)
    assert out.is_file() and not out.with_name("hash.safetensors.layers").exists()


def test_some_layer_is_left_to_lsh(tiny_base: Path, text_folder: Path) -> None:
    with pytest.raises(ConfigError, match="leaves none of the"):
        distill_hash(str(tiny_base), data=[str(text_folder)], exact=99, dry_run=True)
