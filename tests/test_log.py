"""The log's format: dated entries with a verdict, newest first, all listed in the index; references
to it are valid.
"""

import re
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest

from deepseek.claims.evaluation import claim_table

ROOT = Path(__file__).parents[1]
LOG = ROOT / "docs" / "log"
INDEX = LOG / "index.md"
PAGES = sorted(set(LOG.glob("*.md")) - {INDEX})
GROUPS = {
    "Adopted or better": ("adopted", "better"),
    "Measured against a target": ("target met", "target partly met", "target missed"),
    "No difference": ("no difference",),
    "Worse": ("worse",),
    "Not finished": ("not finished",),
}
"""The index's sections -> the verdicts that each of them lists."""
VERDICTS = [verdict for verdicts in GROUPS.values() for verdict in verdicts]
TITLE = re.compile(rf"## (\d{{4}}-\d\d-\d\d) \S.*: ({'|'.join(VERDICTS)})")
LINK = re.compile(r"\[[^\]]*\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)")
LONGEST_LINE = 120


class Entry(NamedTuple):
    """An entry: its title without the hashes, its date, its verdict, and its text."""

    title: str
    date: str
    verdict: str
    text: str


def sections(path: Path, level: str) -> dict[str, str]:
    """Return the text below each heading of a level, by heading; headings must be unique."""
    parts = re.split(rf"^{level} (.*)\n", path.read_text(), flags=re.MULTILINE)[1:]
    assert len(set(parts[::2])) == len(parts[::2]), path
    return dict(zip(parts[::2], parts[1::2], strict=True))


def entries(path: Path) -> list[Entry]:
    """Return a page's entries from top to bottom; raise if a title has the wrong format."""
    found = []
    for title, text in sections(path, "##").items():
        match = TITLE.fullmatch(f"## {title}")
        assert match, f"{path.name}: '{title}' lacks its date or one of the verdicts {VERDICTS}"
        found.append(Entry(title, match[1], match[2], text))
    return found


def anchor(title: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def prose(path: Path) -> list[str]:
    """Return a page's lines except rows of tables."""
    return [line for line in path.read_text().splitlines() if not line.startswith("|")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_entries_are_dated_newest_first_and_measured(page: Path) -> None:
    found = entries(page)
    assert found
    assert all(later.date >= earlier.date for later, earlier in pairwise(found))
    assert not [
        entry.title
        for entry in found
        if not re.search(r"^\*\*Measured\b", entry.text, re.MULTILINE)
    ]
    assert not [
        entry.title
        for entry in found
        if not re.search(r"^\*\*Conclusion\.", entry.text, re.MULTILINE)
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_lines_are_wrapped(page: Path) -> None:
    assert not [line for line in prose(page) if len(line) > LONGEST_LINE]


def test_the_index_s_own_text_is_wrapped() -> None:
    assert not [
        line for line in prose(INDEX) if len(line) > LONGEST_LINE and not line.startswith("- [")
    ]


def test_the_index_lists_every_entry_by_its_verdict_newest_first() -> None:
    line = re.compile(r"^- \[(.*)\]\((.*)\)$", re.MULTILINE)
    listed = {heading: line.findall(text) for heading, text in sections(INDEX, "###").items()}
    assert list(listed) == list(GROUPS)
    for heading, verdicts in GROUPS.items():
        wanted = {
            (entry.title, f"{page.name}#{anchor(entry.title)}")
            for page in PAGES
            for entry in entries(page)
            if entry.verdict in verdicts
        }
        assert set(listed[heading]) == wanted
        assert len(listed[heading]) == len(wanted)
        dates = [title[:10] for title, _ in listed[heading]]
        assert dates == sorted(dates, reverse=True)


def test_the_index_s_table_lists_every_page() -> None:
    listed = re.findall(r"^\| \[.*\]\((.*\.md)\) \|", INDEX.read_text(), re.MULTILINE)
    assert sorted(listed) == [page.name for page in PAGES]


def test_links_between_pages_lead_somewhere() -> None:
    anchors = {page.name: {anchor(entry.title) for entry in entries(page)} for page in PAGES}
    for page in PAGES:
        for name, target in LINK.findall(page.read_text()):
            assert not name or (page.parent / name).is_file(), (page.name, name)
            assert not target or target in anchors[name or page.name], (page.name, target)


def test_what_refers_to_the_log_finds_it() -> None:
    """A docstring's "(docs/log/gates.md, 2026-11-25)" names a page, and a day on which that page
    has an entry.
    """
    sources = [
        path
        for folder in ("deepseek", "benchmarks", "tests")
        for path in (ROOT / folder).rglob("*.py")
    ]
    for path in {*sources, *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")} - {Path(__file__)}:
        for name, date in re.findall(
            r"\blog/([\w-]+\.md)\)?(?:,\s+(\d{4}-\d\d-\d\d))?", path.read_text()
        ):
            assert (LOG / name).is_file(), (path, name)
            assert not date or date in {entry.date for entry in entries(LOG / name)}, (
                path,
                name,
                date,
            )


def test_a_claim_that_is_not_reached_lists_three_attempts() -> None:
    titles = {f"{page.stem}#{anchor(entry.title)}" for page in PAGES for entry in entries(page)}
    rows = claim_table(ROOT).claims
    assert {entry for row in rows for entry in row.attempts} <= titles
    attempts = {row.name: set(row.attempts) for row in rows if row.state != "reached"}
    assert [name for name, found in attempts.items() if len(found) < 3] == []
