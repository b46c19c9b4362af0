"""Code with gaps, for training to fill in the middle.

A whole file does not fit into a training row, and in a long row the middle would be far from the
text around the gap. So a file is cut into excerpts, each with one gap of the kind that an editor
asks for: the rest of a line, or a few lines.
"""

import json
from collections.abc import Iterable

from deepseek.data.text.document import Document, uniform

EXCERPT = 1200
"""Characters of an excerpt, about 400 tokens of code."""
WHOLE_LINES = 0.3
"""Share of gaps that begin with a line; the others begin within one."""
ONE_LINE = 0.6
"""Share of gaps that end with the line in which they begin."""
MOST_LINES = 4
"""Maximum further lines of a gap."""


def with_gaps(documents: Iterable[Document], share: float, seed: int) -> list[Document]:
    """Return documents of which a share of the code files is replaced by excerpts with gaps.

    Args:
        documents: the documents.
        share: share of the code files, chosen by a hash of name and seed.
        seed: seed of that choice and of the gaps.
    """
    result: list[Document] = []
    for document in documents:
        if document.kind == "code" and uniform(f"gap:{seed}:{document.name}") < share:
            result += gapped(document, seed)
        else:
            result.append(document)
    return result


def gapped(document: Document, seed: int) -> list[Document]:
    """Return the excerpts of a code file, each with a gap; blank ones stay as they are."""
    result = []
    for number, excerpt in enumerate(excerpts(document.text)):
        name = f"{document.name}:{number}"
        place = gap(excerpt, f"gap:{seed}:{name}")
        if place is None:
            result.append(Document(excerpt, name, "code", document.time))
            continue
        start, stop = place
        parts = {"prefix": excerpt[:start], "middle": excerpt[start:stop], "suffix": excerpt[stop:]}
        text = json.dumps(parts, ensure_ascii=False)
        result.append(Document(text, name, "infill", document.time))
    return result


def excerpts(text: str) -> list[str]:
    """Return the pieces of a text, cut at line ends, of at most `EXCERPT` characters each unless a
    line is longer.
    """
    pieces = [""]
    for line in text.splitlines(keepends=True):
        if pieces[-1] and len(pieces[-1]) + len(line) > EXCERPT:
            pieces.append("")
        pieces[-1] += line
    return [piece for piece in pieces if piece]


def gap(text: str, key: str) -> tuple[int, int] | None:
    """Return start and stop of a gap in a text; None if all its lines are blank.

    Args:
        text: the text.
        key: determines the gap.
    """
    lines = text.splitlines(keepends=True)
    ends = [0]
    for line in lines:
        ends.append(ends[-1] + len(line))
    candidates = [number for number, line in enumerate(lines) if line.strip()]
    if not candidates:
        return None
    draws = [uniform(f"{key}:{index}") for index in range(5)]
    first = candidates[int(draws[0] * len(candidates))]
    start = ends[first]
    if draws[1] >= WHOLE_LINES:
        line = lines[first].rstrip()
        indent = len(line) - len(line.lstrip())
        start += indent + int(draws[2] * (len(line) - indent))
    further = 0 if draws[3] < ONE_LINE else 1 + int(draws[4] * MOST_LINES)
    last = min(first + further, len(lines) - 1)
    return start, max(start + 1, ends[last] + len(lines[last].rstrip("\r\n")))
