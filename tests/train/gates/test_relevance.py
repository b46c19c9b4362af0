"""A domain's relevance table distinguishes it from public text, and each kind of that counts."""

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.model.experts.relevance import PASSAGE, price_of, text_evidence
from deepseek.train.gates.relevance import (
    LEAST,
    MOST,
    PAIR_LEAST,
    THRESHOLD,
    Background,
    RelevanceFit,
    count_pairs,
    fit_relevance,
)

VOCABULARY = 400


def words(low: int, high: int, count: int, seed: int) -> torch.Tensor:
    return torch.randint(low, high, (count,), generator=torch.Generator().manual_seed(seed))


def phrases(low: int, high: int, count: int, seed: int, step: int = 1) -> torch.Tensor:
    """Return runs of four words whose ids are `step` apart."""
    starts = words(low, high - 3 * step, count // 4, seed)
    return (starts[:, None] + step * torch.arange(4)).flatten()


def counts(low: int, high: int, each: float) -> torch.Tensor:
    found = torch.zeros(VOCABULARY)
    found[low:high] = each
    return found


def public(chats: tuple[torch.Tensor, ...] = ()) -> Background:
    """Return two kinds of public text: words 0 to 99 and, much rarer, 100 to 199."""
    kinds = torch.stack([counts(0, 100, 1000), counts(100, 200, 10)])
    texts = [phrases(0, 100, 50_000, 7, 2), phrases(100, 200, 50_000, 8, 2)]
    passages = [phrases(low, low + 100, 40 * PASSAGE, 9, 2) for low in (0, 100)]
    return Background(
        kinds,
        chats,
        torch.stack([count_pairs(ids_N) for ids_N in texts]),
        tuple(ids_N.view(-1, PASSAGE) for ids_N in passages),
    )


def fitted(*further: torch.Tensor) -> RelevanceFit:
    """Fit a domain of words 100 to 299 against the two kinds."""
    chats = tuple(words(0, 100, 20, 900 + seed) for seed in range(50))
    background = public(chats)
    own, held_out = phrases(100, 300, 6000, 1), phrases(100, 300, 2000, 2)
    return fit_relevance([own, *further], held_out, background)


def test_the_domain_is_told_from_every_kind() -> None:
    found = fitted()
    assert found.admitted_own == 1.0
    assert found.admitted_chats == 0.0
    relevance = found.relevance
    for low, high in ((0, 100), (100, 200)):
        for seed in range(20):
            piece = words(low, high, PASSAGE, seed)
            assert text_evidence(relevance, piece) < THRESHOLD
    assert text_evidence(relevance, words(200, 300, 6, 3)) > THRESHOLD
    assert float(relevance.table_V.max()) <= MOST
    assert float(relevance.table_V.min()) >= -LEAST - 1e-3, "rounded to fp16"


def test_words_that_nobody_has_seen_are_no_evidence_for_a_domain() -> None:
    assert float(fitted().relevance.table_V[300:].max()) <= 0.0


def test_a_further_kind_of_own_text_only_adds_evidence() -> None:
    asked = torch.cat([words(0, 20, 400, 5), words(200, 220, 400, 6)])
    alone, with_questions = fitted().relevance, fitted(asked).relevance
    assert bool((with_questions.table_V >= alone.table_V).all())
    question = torch.cat([words(0, 20, 8, 7), words(200, 220, 3, 8)])
    assert text_evidence(with_questions, question) > text_evidence(alone, question)


def test_pairs_tell_apart_texts_of_the_same_words() -> None:
    """Two code bases may share every token of a language and combine them differently."""

    def text(step: int, seed: int) -> torch.Tensor:
        starts = words(100, 200, 400, seed)
        return torch.stack([starts, 100 + (starts - 100 + step) % 100], 1).flatten()

    relevance = fit_relevance([text(1, 1)], text(1, 2), public()).relevance
    own, other = text(1, 3)[:PASSAGE], text(2, 3)[:PASSAGE]
    assert relevance.keeps(own)
    assert relevance.of_pairs(own) > 0 > relevance.of_pairs(other)
    # The evidence of single tokens is small.
    assert relevance.of_pairs(own) > 10 * abs(text_evidence(relevance, own))


def test_documents_of_public_text_are_ruled_out_and_own_ones_are_not() -> None:
    found = fitted().relevance
    for low, high in ((0, 100), (100, 200)):
        public_text = phrases(low, high, 40 * PASSAGE, 11, 2).view(40, PASSAGE)
        # 7 % of a normal distribution lie beyond 1.5 standard deviations.
        assert sum(found.keeps(ids_N) for ids_N in public_text) <= 6
        stricter = replace(found, offset=found.offset - price_of(8))
        assert sum(stricter.keeps(ids_N) for ids_N in public_text) == 0
    own = phrases(100, 300, 40 * PASSAGE, 3).view(40, PASSAGE)
    assert sum(found.keeps(ids_N) for ids_N in own) >= 39
    assert found.pairs_S is not None
    assert float(found.pairs_S.min()) >= -PAIR_LEAST and float(found.pairs_S.max()) <= MOST


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=60))
def test_evidence_is_at_most_the_likelihood_ratio_against_each_kind(ids: list[int]) -> None:
    """The bound that the table guarantees if nothing is clipped."""
    kinds = public().counts_GV
    own = words(100, 300, 6000, 1)
    relevance = fit_relevance([own], own, public()).relevance
    prior = (kinds.double() / kinds.double().sum(1, keepdim=True)).mean(0)
    prior = (prior + 1e-3 / VOCABULARY) / (1.0 + 1e-3)
    own_V = (own.bincount(minlength=VOCABULARY).double() + 200 * prior) / (len(own) + 200)
    for kind in kinds.double():
        ratio_V = (own_V / ((kind + 200 * prior) / (kind.sum() + 200))).log()
        inside = [token for token in ids if -LEAST < float(ratio_V[token]) < MOST]
        total = float(sum(relevance.table_V[token] for token in inside))
        assert total <= float(ratio_V[inside].sum()) + 0.01 * len(inside)
