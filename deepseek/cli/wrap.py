"""Word wrap of text that streams in pieces, each with its style.

Terminals break a long line in the middle of a word. Here a word is printed once its end is known,
on the next line if it does not fit, so that nothing that stands is ever rewritten. Code between
fences keeps its lines, as a copy of it must stay valid.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.cells import cell_len

if TYPE_CHECKING:
    from rich.console import Console

FENCE = "```"

Emit = Callable[[str, str], None]
"""Function that prints a text in a style."""


class WordWrap:
    """Prints pieces of text, wrapped between words.

    Args:
        width: cells per line; 0: no wrapping, every piece is printed at once.
        emit: prints a text in a style.
    """

    def __init__(self, width: int, emit: Emit) -> None:
        self._width = width
        self._emit = emit
        self._column = 0
        self._word: list[tuple[str, str]] = []
        self._space = ""
        self._line = ""  # its first characters, without leading white space
        self._in_code = False

    @staticmethod
    def on(console: "Console", emit: Emit) -> "WordWrap":
        """Return a wrapper as wide as a terminal; elsewhere text passes as it is."""
        return WordWrap(console.width if console.is_terminal else 0, emit)

    def write(self, text: str, style: str = "") -> None:
        """Take a piece of text; its last word is held back until its end is known."""
        if not self._width:
            self._emit(text, style)
            return
        for character in text:
            self._take(character, style)

    def close(self) -> None:
        """Print what is held back."""
        self._end_word()
        if self._space:
            self._emit(self._space, "")
            self._space = ""

    def _take(self, character: str, style: str) -> None:
        if character == "\n":
            self._end_word()
            self._emit(f"{self._space}\n", "")
            self._space = ""
            self._column = 0
            if self._line == FENCE:
                self._in_code = not self._in_code
            self._line = ""
            return
        if len(self._line) < len(FENCE) and (self._line or not character.isspace()):
            self._line += character
        if self._in_code or self._line == FENCE:
            self._end_word()
            self._emit(self._space + character, style)
            self._space = ""
        elif character in " \t":
            self._end_word()
            self._space += character
        else:
            self._word.append((character, style))
            if cell_len(character) > 1:  # scripts of wide characters break anywhere
                self._end_word()

    def _end_word(self) -> None:
        """Print the word that is held back, on the next line if it does not fit."""
        if not self._word:
            return
        space = cell_len(self._space)
        length = cell_len("".join(character for character, _ in self._word))
        if self._column and self._column + space + length > self._width:
            self._emit("\n", "")
            self._column = 0
        else:
            self._emit(self._space, "")
            self._column += space
        self._space = ""
        for part, style in _joined(self._word):
            self._emit(part, style)
        self._column += length
        self._word = []


def _joined(characters: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the characters as few parts, one for each run of a style."""
    parts: list[tuple[str, str]] = []
    for character, style in characters:
        if parts and parts[-1][1] == style:
            parts[-1] = (parts[-1][0] + character, style)
        else:
            parts.append((character, style))
    return parts
