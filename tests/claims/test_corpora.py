"""Texts that experts are judged by are not among what their gates learn from."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_packages_that_no_expert_knows_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gates take the installed packages for text that no expert knows."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from corpora import PACKAGES, WITHOUT_EXPERT

    locks = [path.read_text() for path in (ROOT / "requirements").glob("*.lock")]
    installed = {name for lock in locks for name in re.findall(r"(?m)^([\w.-]+)==", lock)}
    assert "transformers" in installed
    assert installed.isdisjoint(WITHOUT_EXPERT.split())
    assert set(PACKAGES.split()).isdisjoint(WITHOUT_EXPERT.split())
