"""Read the pages of a PDF file in another process.

A crafted or damaged file can cost its reader minutes or gigabytes: streams decompress a
thousandfold, and forms contain each other. The other process has limits on time and memory, and
hides pypdf's warnings about odd files; this module is also its program.
"""

import json
import resource
import subprocess
import sys
from io import BytesIO
from pathlib import Path

MAX_PAGES = 2_000
"""Maximum pages to read. Longer files are collections, which as one document could not be split."""

MAX_CHARACTERS = 16_000_000
"""Maximum characters of all pages: 2,000 full pages have fewer, so more means repetition."""

SECONDS = 120
"""Limit of processor time; a page of a paper takes about 0.05 s."""

MEMORY = 2 << 30
"""Limit of the address space, in bytes: for pypdf's objects of a page with a detailed drawing."""

DAMAGED = "damaged PDF"
ENCRYPTED = "encrypted PDF"
TOO_COMPLEX = "too complex PDF"
TOO_LARGE = "too large"


class UnreadablePdfError(Exception):
    """The pages of a PDF file cannot be read; the message is the reason in a few words."""


def pdf_pages(data: bytes, seconds: int = SECONDS) -> list[str]:
    """Return the text of each page of a PDF file, read by another process.

    Args:
        data: content of the file.
        seconds: limit of processor time.

    Raises:
        UnreadablePdfError: the file is damaged, encrypted, too large, or exceeds the limits of time
            or memory.
    """
    process = subprocess.run(
        # Without -P the folder of this file is searched first, and its names hide those of the
        # standard library.
        [sys.executable, "-P", str(Path(__file__)), str(seconds)],
        input=data,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    if process.returncode:  # killed at a limit
        raise UnreadablePdfError(TOO_COMPLEX)
    answer = json.loads(process.stdout)
    if isinstance(answer, str):
        raise UnreadablePdfError(answer)
    return [str(page) for page in answer]


def read_pages(data: bytes) -> list[str]:
    """Return the text of each page of a PDF file, read by this process.

    Args:
        data: content of the file.

    Raises:
        UnreadablePdfError: the file is damaged, encrypted or too large.
    """
    from pypdf import PdfReader
    from pypdf.errors import LimitReachedError

    try:
        reader = PdfReader(BytesIO(data))
        # Even those that open without a password: their owner has restricted their use.
        if reader.is_encrypted:
            raise UnreadablePdfError(ENCRYPTED)
        if len(reader.pages) > MAX_PAGES:
            raise UnreadablePdfError(TOO_LARGE)
        pages: list[str] = []
        characters = 0
        for page in reader.pages:
            pages.append(page.extract_text())
            characters += len(pages[-1])
            if characters > MAX_CHARACTERS:
                raise UnreadablePdfError(TOO_LARGE)
    except UnreadablePdfError:
        raise
    except (LimitReachedError, MemoryError):
        raise UnreadablePdfError(TOO_COMPLEX) from None
    except Exception as error:  # damaged files raise errors of many kinds
        raise UnreadablePdfError(DAMAGED) from error
    return pages


def answer() -> None:
    """Print the pages of the file on standard input, or why there are none, as JSON."""
    result: list[str] | str
    try:
        result = read_pages(sys.stdin.buffer.read())
    except UnreadablePdfError as error:
        result = str(error)
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[1]), int(sys.argv[1])))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answer()
