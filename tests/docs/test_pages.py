"""The pages refer to things that exist: links and anchors, commands and options, public names;
their Python compiles.
"""

import ast
import re
import runpy
import shlex
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from pages import CURRENT, DOCS, PAGES, ROOT, SHELL, blocks, page_id, prose
from test_log import anchor

import deepseek

README_WORDS = 700

COMMANDS = runpy.run_path(str(DOCS / "cli_reference.py"))
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"")
SEVERAL = re.compile(r"\w\|\w")
"""`train|list` is a choice, not a command line."""


@cache
def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings; GitHub numbers repeated ones."""
    seen: Counter[str] = Counter()
    names = set()
    for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE):
        name = anchor(re.sub(r"[`*]|\]\([^)]*\)|\[", "", heading))
        names.add(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return names


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for markdown, html in LINK.findall(re.sub(r"`[^`\n]*`", "", prose(page))):
        target, _, fragment = (markdown or html).partition("#")
        if re.match(r"\w+:", target):
            continue
        place = (page.parent / target).resolve() if target else page
        if not place.exists() or (
            fragment and place.suffix == ".md" and fragment not in anchors(place)
        ):
            broken.append(markdown or html)
    assert broken == []


@pytest.mark.parametrize("page", CURRENT, ids=page_id)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    named = re.findall(
        r"`((?:deepseek|tests|benchmarks|docs|examples|requirements)/[a-z0-9_./-]+)`", prose(page)
    )
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", CURRENT, ids=page_id)
def test_python_blocks_compile(page: Path) -> None:
    for block in blocks(page, "python"):
        ast.parse(block)


@cache
def declared() -> dict[str, Any]:
    return dict(COMMANDS["commands"]())


def command_lines(page: Path) -> Iterator[str]:
    """Yield a page's shell commands: lines of code blocks, with continuations joined, and code
    spans in its text.
    """
    for block in blocks(page, *SHELL):
        yield from re.sub(r"\\\n *", " ", block).splitlines()
    yield from (
        span for span in re.findall(r"`([^`\n]+)`", prose(page)) if not SEVERAL.search(span)
    )


def unknown(line: str) -> list[str]:
    """Return the commands and options in a `deepseek` line that do not exist."""
    words = shlex.split(line.split(" | ")[0], comments=True)
    words = words[: words.index("&")] if "&" in words else words
    name, rest = "deepseek", words[1:]
    while rest and f"{name} {rest[0]}" in declared():
        name, rest = f"{name} {rest[0]}", rest[1:]
    if name == "deepseek":
        return [word for word in rest[:1] if not word.startswith("-") and word != "COMMAND"]
    if name == "deepseek bench":  # passes its options on
        return []
    known = COMMANDS["options"](declared()[name])
    return [
        f"{name} {word}"
        for word in rest
        if word.startswith("--") and word.split("=")[0] not in known
    ]


@pytest.mark.parametrize("page", CURRENT, ids=page_id)
def test_commands_and_options_exist(page: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    wrong = []
    for line in command_lines(page):
        words = line.split()
        if words and words[0] in ("deepseek", ".venv/bin/deepseek"):
            wrong += unknown(line)
        elif len(words) > 1 and words[0] == "make" and words[1] not in targets:
            wrong.append(line)
        elif (
            len(words) > 1
            and words[0] == "python"
            and re.match(r"(benchmarks|examples|docs)/.*\.py$", words[1])
        ):
            wrong += [] if (ROOT / words[1]).is_file() else [line]
    assert wrong == []


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("deepseek expert train --name a --layers all  # strong", []),
        ("deepseek expert trian --name a", ["deepseek expert --name"]),
        ("deepseek serve --port 1 --prot 2", ["deepseek serve --prot"]),
        ("deepseek sevre", ["sevre"]),
    ],
)
def test_an_unknown_command_or_option_is_found(line: str, wrong: list[str]) -> None:
    assert unknown(line) == wrong


def test_every_public_name_has_its_place_in_the_reference() -> None:
    page = (DOCS / "reference" / "api.md").read_text()
    named = set(re.findall(r"^::: deepseek\.(\w+)$", page, re.MULTILINE))
    assert named >= set(deepseek.__all__) - {"__version__"}


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= README_WORDS


def test_pictures_are_as_they_are_drawn() -> None:
    drawing = runpy.run_path(str(DOCS / "images" / "draw.py"))
    stale = [
        name
        for name, draw in drawing["PICTURES"].items()
        if (DOCS / "images" / f"{name}.svg").read_text() != draw().source()
    ]
    assert stale == [], "run python docs/images/draw.py"
