"""Join the pages of a PDF file into one text.

pages (`pdf_pages`) -> without running heads -> words joined at line ends -> paragraphs
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from unicodedata import normalize

from deepseek.data.text.pdf_pages import UnreadablePdfError, pdf_pages
from deepseek.terminal import unicode_only

WITHOUT_TEXT = "PDF without text"
"""Reason for skipping scans, whose pages are pictures."""

LEAST_REPEATS = 3
"""Pages that must begin or end with the same line, digits ignored, for it to be a running head."""

EDGES = 2
"""Lines at the top and at the bottom of a page that can be running heads or page numbers."""

CHARACTERS = {
    **{code: normalize("NFKC", chr(code)) for code in range(0xFB00, 0xFB07)},  # ligatures
    **{code: None for code in range(32) if chr(code) not in "\t\n"},  # unmapped glyphs
    **dict.fromkeys((0x00AD, 0x2010), "-"),  # one glyph of a font, under three names
}

BROKEN_WORD = re.compile(r"\b([^\W\d_]{1,40})-\n([^\W\d_]{1,40})(\S*)[ \n]?")
COMPOUND = re.compile(r"\b[^\W\d_]{1,40}-[^\W\d_]{1,40}\b")

HEADING = re.compile(
    r"(?:(?:[1-9]\d?|[A-Z]\.\d{1,2})(?:\.\d{1,2}){0,3}\.?\s+(?![a-z])[^\W\d_][\w ,:&'’()/–-]{0,70}"
    r"|Abstract|References|Acknowledge?ments?)(?<![\d,:])$"
)
"""A line that is a heading: a section number and a title, or a usual title without one.

Lines with signs of formulas are not headings, nor are those that end with a number, as in a table
of contents.
"""

SHORT_LINE = 0.85
"""The last line of a paragraph is shorter than this share of the line before it."""


def pdf_to_text(data: bytes) -> str:
    """Return the text of a PDF file: its lines in reading order, paragraphs separated by blank
    lines, without page numbers and running heads.

    Args:
        data: content of the file.

    Raises:
        UnreadablePdfError: the file has no text or cannot be read; the message says why in a few
            words.
    """
    pages = [page_lines(page) for page in pdf_pages(data)]
    for _ in range(EDGES):
        pages = without_running_heads(pages)
    text = "\n".join(chain.from_iterable(pages))
    if not text:
        raise UnreadablePdfError(WITHOUT_TEXT)
    return with_paragraphs(joined_words(text).splitlines())


def page_lines(page: str) -> list[str]:
    """Return the lines of a page that are not blank, in plain characters."""
    lines = (line.strip() for line in unicode_only(page).translate(CHARACTERS).split("\n"))
    return [line for line in lines if line]


def without_running_heads(pages: Sequence[list[str]]) -> list[list[str]]:
    """Return the pages without first and last lines that, digits ignored, occur there on
    `LEAST_REPEATS` pages.
    """
    tops = Counter(_without_numbers(page[0]) for page in pages if page)
    bottoms = Counter(_without_numbers(page[-1]) for page in pages if page)
    remaining_pages = []
    for page in pages:
        start = int(bool(page) and _is_running(page[0], tops))
        stop = len(page) - int(len(page) > start and _is_running(page[-1], bottoms))
        remaining_pages.append(page[start:stop])
    return remaining_pages


def _is_running(line: str, counts: Counter[str]) -> bool:
    # A bracket that ends many pages is code, not a running head.
    is_text = any(character.isalnum() for character in line)
    return is_text and counts[_without_numbers(line)] >= LEAST_REPEATS


def _without_numbers(line: str) -> str:
    return re.sub(r"\d+", "", line).strip()


def joined_words(text: str) -> str:
    """Return a text in which words that are hyphenated at line ends are whole.

    The hyphen stays if the same compound stands within a line elsewhere in the text.
    """
    compounds = {compound.lower() for compound in COMPOUND.findall(text)}

    def join(match: re.Match[str]) -> str:
        first, second, rest = match.groups()
        if not second[0].islower():  # a compound of names
            return match[0]
        hyphen = "-" if f"{first}-{second}".lower() in compounds else ""
        return f"{first}{hyphen}{second}{rest}\n"

    return BROKEN_WORD.sub(join, text)


def with_paragraphs(lines: Iterable[str]) -> str:
    """Return the lines as a text with a blank line after each paragraph and around each heading.

    PDF files hold lines, not paragraphs: one ends where a sentence ends in a short line.
    """
    parts: list[str] = []
    previous_line = ""
    for line in lines:
        is_heading = HEADING.match(line) is not None
        if is_heading and parts and parts[-1] != "":
            parts.append("")
        parts.append(line)
        ends = line[-1:] in ".!?:" and len(line) < SHORT_LINE * len(previous_line)
        if is_heading or ends:
            parts.append("")
        previous_line = line
    return "\n".join(parts).strip() + "\n"
