"""The pages of the documentation, and their fenced blocks."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "examples").glob("*.md"), *DOCS.rglob("*.md")])
CURRENT = [
    page for page in PAGES if page.name != "CHANGELOG.md" and DOCS / "log" not in page.parents
]
"""Pages about the current state; changelog and log also name things that no longer exist."""

BLOCK = re.compile(r"^( *)```([\w+-]*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
SHELL = ("", "bash", "sh", "console")


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> list[str]:
    """Return a page's fenced blocks of some languages."""
    return [text for _, language, text in BLOCK.findall(page.read_text()) if language in languages]


def prose(page: Path) -> str:
    """Return a page without its fenced blocks."""
    return BLOCK.sub("", page.read_text())
