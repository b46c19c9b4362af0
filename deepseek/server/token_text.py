"""The texts of single tokens, as reported in log probabilities and by `/tokenize`."""

from codecs import getincrementaldecoder
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from deepseek.engine.engine import Engine

CACHED = 1 << 16
"""Maximum number of tokens whose texts are cached."""


class TokenText(NamedTuple):
    """Text of a token.

    Attributes:
        text: its text, with U+FFFD for a part of a character.
        content: its bytes; None if they are unknown.
    """

    text: str
    content: bytes | None


class TokenTexts:
    """The texts of a model's tokens.

    Args:
        engine: the engine that serves the model.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._backend = engine.tokenizer.backend_tokenizer
        self._added = engine.tokenizer.added_tokens_decoder
        self._size = len(engine.tokenizer)
        self.within = lru_cache(CACHED)(self._within)
        self.first = lru_cache(CACHED)(self._first)
        try:
            # Takes up to a few seconds, in which no other thread runs; better now than in a
            # request.
            engine.token_bytes(0)
            self._has_bytes = True
        except ValueError:  # raised by llguidance, which does not support every kind of decoder
            self._has_bytes = False

    def is_special(self, token: int) -> bool:
        """Return whether a token is left out of answers, such as the end of a turn."""
        return token in self._added and self._added[token].special

    def _within(self, token: int) -> TokenText:
        """Return the text of a token within a text.

        Decoded alone, it could lose a space that some decoders drop at the beginning of a text.

        Args:
            token: its id.
        """
        has_bytes = self._has_bytes and token < self._size and token not in self._added
        content = self._engine.token_bytes(token) if has_bytes else b""
        if content:
            return TokenText(content.decode(errors="replace"), content)
        return self._decoded(token)

    def _first(self, token: int) -> TokenText:
        """Return the text of a token at the beginning of a text.

        Args:
            token: its id.
        """
        decoded = self._decoded(token)
        return self.within(token) if decoded.content is None else decoded

    def _decoded(self, token: int) -> TokenText:
        text = self._backend.decode([token], skip_special_tokens=False)
        return TokenText(text, None if "\ufffd" in text else text.encode())


class CharacterPlaces:
    """Counts the characters before each token of a text.

    A character that several tokens make up counts once, after the last of them.

    Args:
        start: characters before the first token.
    """

    def __init__(self, start: int) -> None:
        self._place = start
        self._decoder = getincrementaldecoder("utf-8")("replace")

    def next(self, token: TokenText) -> int:
        """Return the number of characters before the next token."""
        place = self._place
        content = token.content
        self._place += len(token.text if content is None else self._decoder.decode(content))
        return place


class TokenReader:
    """Reads the tokens of one text in their order.

    Args:
        texts: the texts of the model's tokens.
        has_special: whether the text includes that of special tokens; default: False, they are left
            out, so it begins after them.
    """

    def __init__(self, texts: TokenTexts, has_special: bool = False) -> None:
        self._texts = texts
        self._has_special = has_special
        self._begun = False

    def at(self, token: int) -> Callable[[int], TokenText]:
        """Return the texts of tokens at the position of the next token.

        Args:
            token: the next token; the others to be read are its alternatives.
        """
        if self._begun:
            return self._texts.within
        self._begun = self._has_special or not self._texts.is_special(token)
        return self._texts.first
