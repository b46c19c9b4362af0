"""Retrieved passages as part of a prompt."""

from collections.abc import Iterable

from deepseek.retrieval.passages import Passage

QUERY_LINES = 12
"""Last lines of a text that say what is looked for: as many as a passage of code is matched by."""


def query_of(text: str) -> str:
    """Return the part of an unfinished text to search with: its last lines, the very last ones
    counted again.
    """
    lines = [line for line in text.splitlines() if line.strip()][-QUERY_LINES:]
    return "\n".join([*lines, *lines[-3:]])


def before_text(passages: Iterable[Passage]) -> str:
    """Return what stands before a text that goes on: passages as files with their header, the best
    one last.

    The header is that of the training rows (`data.encode.header`), so an expert has seen its form.
    """
    return "".join(_headed(passage) for passage in reversed(list(passages)))


def in_question(passages: Iterable[Passage], question: str) -> str:
    """Return a question with passages before it, for a chat."""
    found = before_text(passages)
    return f"Excerpts that may help:\n\n{found}{question}" if found else question


def _headed(passage: Passage) -> str:
    title = (
        "" if passage.kind in ("text", "messages") else f"file: {passage.path or passage.name}\n\n"
    )
    return f"{title}{passage.text.strip(chr(10))}\n\n"
