"""What the site has beside `docs/`: the page of commands, pages and pictures of the repository, and
links to them.

mkdocs calls the functions that begin with `on_`. Links in pages are those that work in a clone; one
that leaves `docs/` leads to the copy on the site, or becomes plain text if there is none.
"""

import posixpath
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))
import cli_reference  # noqa: E402 - it lies beside this file

COPIES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"} | {
    f"benchmarks/results/{path.name}": f"images/results/{path.name}"
    for path in (ROOT / "benchmarks" / "results").glob("*.png")
}
"""Files of the repository that the site has, and where."""

SOURCES = {place: path for path, place in COPIES.items()}
GENERATED = "reference/cli.md"

FENCE = re.compile(r"^ *(```|~~~)")
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add what does not lie in `docs/`."""
    files.append(File.generated(config, GENERATED, content=cli_reference.page()))
    for path, place in COPIES.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links outside fenced blocks to where their files are on the site."""
    lines, fenced = [], False
    for line in markdown.split("\n"):
        border = bool(FENCE.match(line))
        fenced ^= border
        lines.append(
            line if fenced or border else LINK.sub(partial(moved, here=page.file.src_uri), line)
        )
    return "\n".join(lines)


def moved(match: re.Match[str], here: str) -> str:
    """Return a link of the page `here` as the site has it."""
    picture, text, target, anchor = match[1], match[2], match[3], match[4] or ""
    if ":" in target:
        return match[0]
    origin = SOURCES.get(here, f"docs/{here}")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))
    place = path.removeprefix("docs/") if path.startswith("docs/") else COPIES.get(path)
    if place is None:
        return text
    relative = posixpath.relpath(place, posixpath.dirname(here) or ".")
    return f"{picture}[{text}]({relative}{anchor})"
