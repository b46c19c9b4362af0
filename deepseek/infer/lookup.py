"""Guessing the next tokens of a text from what followed the same words earlier in it.

A step reads all weights whether it computes one token or a few, so guesses that turn out right are nearly free, and
those that turn out wrong change nothing: the token after each of them is chosen as it would have been without them
(prompt lookup, a speculative decoding without a second model: arXiv:2302.01318, arXiv:2304.04487).
"""

from collections.abc import Iterable

WORDS = 2  # tokens that must be the same


class Lookup:
    """The tokens of one text, and where each pair of them was last followed by what.

    Attributes:
        guesses: those made last, which have not been judged.
    """

    def __init__(self, ids: Iterable[int]) -> None:
        self._ids: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        self._most = 1
        self.guesses: list[int] = []
        for token in ids:
            self.push(token)

    def push(self, token: int) -> None:
        """Append a token to the text."""
        self._after[tuple(self._ids[-WORDS:])] = len(self._ids)
        self._ids.append(token)

    def guess(self, most: int) -> list[int]:
        """Return the tokens, `most` at most, that followed the last ones where these stood before."""
        start = self._after.get(tuple(self._ids[-WORDS:]), len(self._ids))
        self.guesses = self._ids[start : start + max(0, min(most, self._most))]
        return self.guesses

    def judge(self, right: int) -> None:
        """Take note of how many of the guesses were right: where most were, more come next time."""
        if self.guesses:
            self._most, self.guesses = 1 + 2 * right, []
