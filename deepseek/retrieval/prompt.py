"""Add retrieved passages to a prompt."""

from collections.abc import Iterable

from deepseek.retrieval.passages import Passage

QUERY_LINES = 12
"""Last lines of an unfinished text that form its query, as many as the matched lines of a code
passage.
"""


def query_of(text: str) -> str:
    """Return the query for an unfinished text: its last lines, with the last three weighted
    twice.
    """
    lines = [line for line in text.splitlines() if line.strip()][-QUERY_LINES:]
    return "\n".join([*lines, *lines[-3:]])


def before_text(passages: Iterable[Passage]) -> str:
    """Return passages as the prefix of an unfinished text, each with a file header, the best one
    last.

    Training rows have the same header (`data.encode.header`), so that experts know the format.
    """
    return "".join(_headed(passage) for passage in reversed(list(passages)))


def in_question(passages: Iterable[Passage], question: str) -> str:
    """Return a chat question preceded by passages."""
    excerpts = before_text(passages)
    return f"Excerpts that may help:\n\n{excerpts}{question}" if excerpts else question


def _headed(passage: Passage) -> str:
    title = (
        "" if passage.kind in ("text", "messages") else f"file: {passage.path or passage.name}\n\n"
    )
    return f"{title}{passage.text.strip(chr(10))}\n\n"
