"""Tokenise text for search: identifiers as a whole and in parts."""

import unicodedata
from itertools import pairwise

import regex

LETTERS = r"[\p{L}\p{N}][\p{L}\p{N}\p{M}]*"
"""Letters and digits with their marks: many scripts write vowels as marks on consonants."""
WORD = regex.compile(rf"{LETTERS}(?:_+{LETTERS})*")
UPPER, LOWER = r"(?:\p{Lu}\p{M}*)", r"(?:\p{Ll}\p{M}*)"
PART = regex.compile(
    rf"{UPPER}+(?={UPPER}{LOWER})|{UPPER}?{LOWER}+|{UPPER}+|\d+|[^\p{{Lu}}\p{{Ll}}\d_]+"
)
"""Part of a word: capitals, a capitalised or lower-case run, digits, or letters without case."""
JOINER = "\u200d"
"""Zero-width joiner, which some writers leave out."""
SCRIPTS_WITHOUT_SPACES = (
    "Han",
    "Hiragana",
    "Katakana",
    "Hangul",
    "Thai",
    "Lao",
    "Khmer",
    "Myanmar",
)
WITHOUT_SPACES = regex.compile(
    "(?:["
    + "".join(rf"\p{{Script={name}}}" for name in SCRIPTS_WITHOUT_SPACES)
    + r"\u30fc]\p{M}*)+"
)
"""A run of a script without spaces between words; U+30FC lengthens vowels in Japanese."""


def search_words(text: str) -> list[str]:
    """Return the lower-case search terms of a text for BM25.

    An identifier yields itself and its parts: `parseHeader_v2` gives `parseheader_v2`, `parse`,
    `header`, `v`, `2`. Chinese, Japanese, Korean, Thai, Lao, Khmer and Burmese yield character
    bigrams, since spaces don't separate all their words. Accents and vowel signs are part of their
    letter, however they are encoded.
    """
    words: list[str] = []
    joined = unicodedata.normalize("NFC", text).replace(JOINER, "")
    for match in WORD.finditer(joined):
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
    letters = regex.findall(r"\X", run)  # with their marks
    return ["".join(pair) for pair in pairwise(letters)] or [run]
