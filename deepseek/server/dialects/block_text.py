"""The text of an answer that ends with its block of code or at a time limit."""


class BlockText:
    """The text of an answer. It ends before a line that leaves its block, or at a line end once
    the time is up.

    Args:
        indent: characters of white space that a line of the block begins with, at least.
        seconds: time limit of the text in seconds.
    """

    def __init__(self, indent: int, seconds: float) -> None:
        self.finish: str | None = None
        """Finish reason once the text has ended."""
        self._indent = indent
        self._seconds = seconds
        self._held = ""  # a line end and the white space after it, until the line's indent is known

    def take(self, piece: str, elapsed: float) -> str:
        """Return the text that can be sent after the next piece.

        Args:
            piece: the piece; there are none after the end.
            elapsed: seconds since the first piece.
        """
        decided = ""
        for character in piece:
            if character == "\n" and elapsed > self._seconds:
                self.finish = "length"
                return decided
            if character == "\n" or (self._held and character in " \t"):
                self._held += character
                continue
            if self._held and len(self._held.rpartition("\n")[2]) < self._indent:
                self.finish = "stop"
                return decided
            decided += self._held + character
            self._held = ""
        return decided

    def rest(self) -> str:
        """Return the text that is still held back when the answer has ended by itself."""
        return self._held
