"""Tokenise text for search: identifiers as a whole and in parts."""

import re
import unicodedata

import regex

WORD = re.compile(r"[^\W_]+(?:_+[^\W_]+)*")
PART = regex.compile(r"\p{Lu}+(?=\p{Lu}\p{Ll})|\p{Lu}?\p{Ll}+|\p{Lu}+|\d+|[^\p{Lu}\p{Ll}\d_]+")
"""Part of a word: capitals, a capitalised or lower-case run, digits, or letters without case."""
WITHOUT_SPACES = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")


def search_words(text: str) -> list[str]:
    """Return the lower-case search terms of a text for BM25.

    An identifier yields itself and its parts: `parseHeader_v2` gives `parseheader_v2`, `parse`,
    `header`, `v`, `2`. Chinese, Japanese and Korean yield character bigrams, since their words are
    not separated by spaces. An accent is part of its letter, however it is encoded.
    """
    words: list[str] = []
    # A combining accent is no letter to `WORD`, which would split the word there.
    for match in WORD.finditer(unicodedata.normalize("NFC", text)):
        word = match[0]
        if WITHOUT_SPACES.search(word):
            words += [pair for run in WITHOUT_SPACES.findall(word) for pair in _pairs(run)]
            word = WITHOUT_SPACES.sub("", word)
        parts = PART.findall(word)
        words += [part.lower() for part in parts]
        if len(parts) > 1:
            words.append(word.lower())
    return words


def _pairs(run: str) -> list[str]:
    return [run[place : place + 2] for place in range(len(run) - 1)] or [run]
