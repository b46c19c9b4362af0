"""The table of words of a domain: it tells it from every kind of public text, and each kind
counts.
"""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.model.experts.relevance import text_evidence
from deepseek.train.gates.relevance import (
    LEAST,
    MOST,
    THRESHOLD,
    Background,
    RelevanceFit,
    fit_relevance,
)

VOCABULARY = 400


def words(low: int, high: int, count: int, seed: int) -> torch.Tensor:
    return torch.randint(low, high, (count,), generator=torch.Generator().manual_seed(seed))


def counts(low: int, high: int, each: float) -> torch.Tensor:
    found = torch.zeros(VOCABULARY)
    found[low:high] = each
    return found


def fitted(*further: torch.Tensor) -> RelevanceFit:
    """A domain of words 100 to 299 beside two kinds: 0 to 99 and, far rarer, 100 to 199."""
    chats = tuple(words(0, 100, 20, 900 + seed) for seed in range(50))
    background = Background(torch.stack([counts(0, 100, 1000), counts(100, 200, 10)]), chats)
    own, held_out = words(100, 300, 6000, 1), words(100, 300, 2000, 2)
    return fit_relevance([own, *further], held_out, background)


def test_the_domain_is_told_from_every_kind() -> None:
    found = fitted()
    assert found.admitted_own == 1.0
    assert found.admitted_chats == 0.0
    relevance = found.relevance
    for low, high in ((0, 100), (100, 200)):
        for seed in range(20):
            piece = words(low, high, 64, seed)
            assert text_evidence(relevance, piece) < THRESHOLD
            assert not relevance.keeps(piece)
    assert text_evidence(relevance, words(200, 300, 6, 3)) > THRESHOLD
    assert float(relevance.table_V.max()) <= MOST
    assert float(relevance.table_V.min()) >= -LEAST


def test_words_that_nobody_has_seen_are_no_evidence_for_a_domain() -> None:
    assert float(fitted().relevance.table_V[300:].max()) <= 0.0


def test_a_further_kind_of_own_text_only_adds_evidence() -> None:
    asked = torch.cat([words(0, 20, 400, 5), words(200, 220, 400, 6)])
    alone, with_questions = fitted().relevance, fitted(asked).relevance
    assert bool((with_questions.table_V >= alone.table_V).all())
    question = torch.cat([words(0, 20, 8, 7), words(200, 220, 3, 8)])
    assert text_evidence(with_questions, question) > text_evidence(alone, question)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=60))
def test_evidence_is_at_most_the_likelihood_ratio_against_each_kind(ids: list[int]) -> None:
    """The bound that the table stands for, where nothing is cut off."""
    kinds = torch.stack([counts(0, 100, 1000), counts(100, 200, 10)])
    own = words(100, 300, 6000, 1)
    relevance = fit_relevance([own], own, Background(kinds, ())).relevance
    prior = (kinds.double() / kinds.double().sum(1, keepdim=True)).mean(0)
    prior = (prior + 1e-3 / VOCABULARY) / (1.0 + 1e-3)
    own_V = (own.bincount(minlength=VOCABULARY).double() + 200 * prior) / (len(own) + 200)
    for kind in kinds.double():
        ratio_V = (own_V / ((kind + 200 * prior) / (kind.sum() + 200))).log()
        inside = [token for token in ids if -LEAST < float(ratio_V[token]) < MOST]
        total = float(sum(relevance.table_V[token] for token in inside))
        assert total <= float(ratio_V[inside].sum()) + 0.01 * len(inside)
