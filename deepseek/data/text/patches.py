"""Read a commit's document: its message, and the changes of each file."""

import re
from dataclasses import dataclass

NOWHERE = "/dev/null"
"""Stands for the path of a file before it was added, and after it was deleted."""

# The `@@` tells a header from a removed line `-- x` before an added line `++ y`.
START = re.compile(r"^(?=--- .*\n\+\+\+ .*\n@@)", re.MULTILINE)
HEADER = re.compile(r"--- (.*)\n\+\+\+ (.*)\n")


@dataclass(frozen=True)
class Patch:
    """The changes of one file.

    Attributes:
        text: header, which names the file, and hunks.
        before: path before the commit, or `NOWHERE`.
        after: path after the commit, or `NOWHERE`.
    """

    text: str
    before: str
    after: str

    @property
    def path(self) -> str:
        """Path of the file, the former one if the commit deleted it."""
        return self.before if self.after == NOWHERE else self.after


def message_and_patches(text: str) -> tuple[str, list[Patch]]:
    """Return the message of a commit, with the blank line after it, and its patches; joined, they
    are the text of its document.
    """
    message, *parts = START.split(text)
    headers = [HEADER.match(part) for part in parts]
    pairs = zip(parts, headers, strict=True)
    return message, [Patch(part, header[1], header[2]) for part, header in pairs if header]
