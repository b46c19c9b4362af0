"""Text of others on a terminal: the one function through which it passes.

Names of files, fields of packs and the output of models may hold escape codes, which could move the
cursor, change the title or rewrite what stands above. Lines that are printed go through `visible`.
"""

import re

ASCII_CONTROLS = r"\x00-\x1f\x7f"

INVISIBLE = (
    r"\x80-\x9f"  # C1 controls, which terminals obey like escape codes
    r"\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # change the direction of writing
    r"\u2028\u2029"  # separate lines and paragraphs
    r"\ud800-\udfff"  # surrogates: undecodable bytes, which no stream can encode
)

ONE_LINE = re.compile(f"[{ASCII_CONTROLS}{INVISIBLE}]")
SURROGATES = re.compile("[\ud800-\udfff]")
LINES = re.compile(rf"(?![\n\t])[{ASCII_CONTROLS}{INVISIBLE}]")


def visible(text: object, lines: bool = False) -> str:
    """Return text in which control characters are written out, such as `\\x1b`.

    Args:
        text: text, or an object whose text is printed.
        lines: keep line breaks and tabs, which can forge no more than further lines; default: one
            line.
    """
    pattern = LINES if lines else ONE_LINE
    return pattern.sub(lambda match: ascii(match[0])[1:-1], str(text))


def unicode_only(text: str) -> str:
    """Return text with U+FFFD in place of each lone surrogate."""
    return SURROGATES.sub("\ufffd", text)


def is_unicode(text: str) -> bool:
    """Return whether a text has no lone surrogates, which stand for undecodable bytes or for half
    of a character.
    """
    return not SURROGATES.search(text)
