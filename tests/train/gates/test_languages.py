"""The most common words of languages as token counts: inside a text, in both cases, no digits."""

from collections import Counter

import pytest
import torch
from tiny_model import tiny_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from wordfreq import get_frequency_dict

from deepseek.data.builders.everyday import everyday_conversations
from deepseek.text.tokenizer import encode_continued
from deepseek.train.gates import languages
from deepseek.train.gates.languages import TOKENS, language_counts

LANGUAGES = sorted({conversation.language for conversation in everyday_conversations()})


def test_every_language_of_the_conversations_has_words() -> None:
    model, tokenizer = tiny_model()
    counts_LV = language_counts(tokenizer, model.config.vocab_size, LANGUAGES)
    assert counts_LV.shape == (len(LANGUAGES), model.config.vocab_size)
    torch.testing.assert_close(counts_LV.sum(1), torch.full((len(LANGUAGES),), float(TOKENS)))


@pytest.mark.parametrize(("language", "space"), [("fr", " "), ("zh", "")])
def test_counts_are_those_of_words_one_by_one(
    monkeypatch: pytest.MonkeyPatch, language: str, space: str
) -> None:
    monkeypatch.setattr(languages, "WORDS", 40)
    model, tokenizer = tiny_model()
    found = get_frequency_dict(language, wordlist="small")
    words = sorted((w for w in found if not any(map(str.isdigit, w))), key=lambda w: -found[w])[:40]
    expected: Counter[int] = Counter()
    for word in words:
        for form in (word, word[0].upper() + word[1:]):
            (ids,) = encode_continued(tokenizer, [space + form])
            for token in ids:
                expected[token] += found[word]
    counts_V = language_counts(tokenizer, model.config.vocab_size, [language])[0]
    total = sum(expected.values())
    assert set(counts_V.nonzero().flatten().tolist()) == set(expected)
    for token, share in expected.items():
        assert float(counts_V[token]) == pytest.approx(TOKENS * share / total, rel=1e-4)


def test_a_language_that_the_tokenizer_cannot_write_is_left_out() -> None:
    letters = {letter: place for place, letter in enumerate("абвгдежзийклмнопрстуфхцчшщъыьэюя")}
    alphabet = Tokenizer(models.BPE(letters, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=alphabet)
    counts_LV = language_counts(tokenizer, len(letters), ["ru", "hi", "ko"])
    assert counts_LV.shape == (1, len(letters)) and bool(counts_LV.isfinite().all())
