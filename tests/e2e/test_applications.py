"""The applications run from training to figures on a tiny base."""

import json
import os
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from new_home import new_home
from pdf_files import pdf_of
from processes import run
from tiny_expert import save_base

APPLICATIONS = Path(__file__).parents[2] / "examples" / "applications"
CODE = Path(sysconfig.get_path("stdlib")) / "asyncio"
DOCS = APPLICATIONS.parents[1] / "docs" / "how-to"

pytestmark = pytest.mark.slow


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base", max_position_embeddings=1024)


def figures(name: str, base: Path, *options: object) -> dict[str, Any]:
    """Run an application on a base, and return the figures that it writes."""
    out = base.parent / "figures.json"
    environment = {**os.environ, "DEEPSEEK_HOME": str(new_home(base.parent / "home"))}
    command = [sys.executable, APPLICATIONS / name, *options, "--base", base, "--json", out]
    result = run(list(map(str, command)), env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_lines_are_completed_as_an_editor_asks_for_them(base: Path) -> None:
    found = figures("code_assistant.py", base, CODE, "--tokens", 2048, "--cases", 5)
    assert found["cases"] == 5
    sides = ("base", "retrieval", "expert", "expert and retrieval")
    assert set(found) == {"cases", *sides}
    assert all(0 <= found[side]["similarity"] < 1 for side in sides)
    assert all(found[side]["milliseconds"] > 0 for side in sides)


def test_experts_of_a_shop_and_of_a_language_meet_in_a_request(base: Path) -> None:
    amount = ("--tokens", 2048, "--epochs", 1, "--layers", "last:1")
    found = figures("support.py", base, f"german={DOCS}", *amount)
    assert list(found) == ["english", "german", "spanish"]
    assert list(found["german"]) == ["none", "shop", "german", "shop and german"]
    assert list(found["spanish"]) == ["none", "shop"]


def test_teams_use_their_own_experts_while_one_is_updated(base: Path) -> None:
    sources = (f"code={CODE}", f"docs={DOCS}")
    found = figures("team_server.py", base, *sources, "--tokens", 2048, "--asked", 3)
    assert found["refused"] == 2
    assert found["update"]["failures"] == 0 and found["update"]["replies"] > 0
    for name, team in found["teams"].items():
        assert team["replies"] == 3
        assert set(team["experts"]) <= {name}


@pytest.fixture
def papers(tmp_path: Path) -> Path:
    """A folder of PDF files and Markdown pages that each define a term."""
    folder = tmp_path / "papers"
    folder.mkdir()
    for number, letter in enumerate("abcdefghijklmnop"):
        term = f"fold{letter}"
        told = f"A {term} is a protein that helps others to fold by their part {letter}."
        lines = [f"Line {line} of paper {number} is about {term}." for line in range(30)]
        if number % 2:
            text = f"# Introduction to {term}\n\n{told}\n\n" + "\n".join(lines)
            (folder / f"{term}.md").write_text(text)
        else:
            (folder / f"{term}.pdf").write_bytes(pdf_of([told], lines))
    return folder


def test_papers_are_learnt_searched_and_asked_about(papers: Path, base: Path) -> None:
    found = figures("papers.py", base, papers, "--quick", "--questions", 6, "--cases", 6)
    assert list(found) == ["base", "retrieval", "expert", "expert + retrieval"]
    assert all(row["questions"]["trained"] == 6 for row in found.values())
    assert (base.parent / "home" / "experts" / "papers-asked.index").is_dir()
