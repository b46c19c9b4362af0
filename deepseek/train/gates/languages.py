"""Languages as kinds of public text: how often their commonest words occur.

The few everyday messages of a language lack most of its words. Without word frequencies, the words
that the expert of a French manual has read a hundred times, and the messages never, would count as
evidence for it in any French conversation.
"""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from deepseek.text.tokenizer import encode_continued

WORDS = 5000
"""Number of words of a language, the commonest ones."""

TOKENS = 1_000_000
"""Weight of a language's frequencies, in tokens; so large that the prior hardly matters."""

WITHOUT_SPACES = ("ja", "zh")
"""Languages that write no spaces between words."""


def language_counts(
    tokenizer: PreTrainedTokenizerFast, vocab_size: int, languages: Sequence[str]
) -> Tensor:
    """Return the expected counts of tokens `[L, V]` in `TOKENS` tokens of each language.

    The frequencies of words are those of `wordfreq`, which are lower-case; half of a word's
    occurrences count as capitalised. A language whose script the tokenizer lacks is left out.

    Args:
        tokenizer: tokenizer of the base.
        vocab_size: V.
        languages: ISO 639-1 codes.
    """
    counts_LV = torch.stack([_counts(tokenizer, vocab_size, language) for language in languages])
    totals_L1 = counts_LV.sum(1, keepdim=True)
    return (counts_LV * (TOKENS / totals_L1))[totals_L1[:, 0] > 0]


def _counts(tokenizer: PreTrainedTokenizerFast, vocab_size: int, language: str) -> Tensor:
    """Return the expected tokens `[V]` per word of a language."""
    from wordfreq import get_frequency_dict  # reads its lists of languages when it is imported

    frequencies = {
        word: share
        for word, share in get_frequency_dict(language, wordlist="small").items()
        if not any(character.isdigit() for character in word)  # numbers, with 0 for every digit
    }
    words = sorted(frequencies, key=frequencies.__getitem__, reverse=True)[:WORDS]
    space = "" if language in WITHOUT_SPACES else " "
    capitalised = [word[:1].upper() + word[1:] for word in words]
    rows = encode_continued(tokenizer, [space + word for word in [*words, *capitalised]])
    lengths_W = torch.tensor([len(ids) for ids in rows], device="cpu")
    ids_N = torch.tensor([*chain.from_iterable(rows)], dtype=torch.long, device="cpu")
    shares_W = torch.tensor([frequencies[word] for word in words], device="cpu").repeat(2)
    return ids_N.bincount(shares_W.repeat_interleave(lengths_W), minlength=vocab_size).float()
