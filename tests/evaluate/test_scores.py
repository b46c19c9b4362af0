"""Confidence intervals, and scores of lines."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from deepseek.evaluate.scores import (
    edit_similarity,
    is_exact,
    paired_difference,
    sign_flip_p,
    wilson,
)

SHARES = st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=60)


@given(st.text(max_size=40), st.text(max_size=40))
def test_edit_similarity_is_a_share_that_is_one_for_equal_lines(one: str, other: str) -> None:
    assert 0.0 <= edit_similarity(one, other) <= 1.0
    assert edit_similarity(one, f"  {one}\n") == 1.0
    assert is_exact(one, f"  {one}\n")


@given(st.integers(1, 500).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_the_wilson_interval_holds_the_share_and_stays_within_bounds(
    counts: tuple[int, int],
) -> None:
    right, total = counts
    interval = wilson(right, total)
    assert 0.0 <= interval.low <= interval.mean <= interval.high <= 1.0


def test_wilson_as_published() -> None:
    interval = wilson(10, 100)  # Newcombe 1998, method 3
    assert (interval.low, interval.high) == (
        pytest.approx(0.0552, abs=1e-4),
        pytest.approx(0.1744, abs=1e-4),
    )
    assert (wilson(0, 0).low, wilson(0, 0).high) == (0.0, 1.0)


@given(SHARES, st.integers(0, 5))
def test_a_row_does_not_differ_from_itself(shares: list[float], seed: int) -> None:
    difference = paired_difference(shares, shares, seed)
    assert (difference.mean, difference.low, difference.high) == (0.0, 0.0, 0.0)
    assert not difference.excludes_zero


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([0.0, 1.0])), min_size=1))
def test_a_difference_of_shares_stays_within_bounds(cases: list[tuple[str, float]]) -> None:
    documents, mine = zip(*cases, strict=True)
    difference = paired_difference(mine, [0.0] * len(mine), documents=documents)
    assert 0.0 <= difference.low <= difference.high <= 1.0
    assert difference.mean == pytest.approx(sum(mine) / len(mine))


def test_cases_of_one_document_are_not_independent() -> None:
    documents = [str(place // 50) for place in range(500)]
    mine = [float(place // 50 % 2) for place in range(500)]  # all cases of a document agree
    alone = paired_difference(mine, [0.5] * 500)
    together = paired_difference(mine, [0.5] * 500, documents=documents)
    assert together.mean == alone.mean == 0.0
    assert together.high > 2.5 * alone.high and together.low < 2.5 * alone.low
    error = (0.25 / 10) ** 0.5  # standard error of the mean over ten documents
    assert together.high == pytest.approx(1.96 * error, rel=0.15)


def test_cases_that_each_have_a_document_or_all_the_same_are_independent() -> None:
    mine = [1.0, 0.0, 0.0] * 50
    alone = paired_difference(mine, [0.0] * 150)
    assert alone == paired_difference(mine, [0.0] * 150, documents=[f"{n:03}" for n in range(150)])
    assert alone == paired_difference(mine, [0.0] * 150, documents=["one"] * 150)


def test_documents_whose_cases_are_independent_do_not_widen_the_interval() -> None:
    generator = np.random.default_rng(0)
    documents = [str(place % 20) for place in range(200)]
    ratios = []
    for _ in range(20):
        mine = generator.integers(0, 2, 200).astype(float).tolist()
        alone = paired_difference(mine, [0.0] * 200)
        grouped = paired_difference(mine, [0.0] * 200, documents=documents)
        ratios.append((grouped.high - grouped.low) / (alone.high - alone.low))
    assert np.mean(ratios) == pytest.approx(1.0, abs=0.1)


@given(
    st.lists(
        st.tuples(
            st.sampled_from("abcde"), st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 1.0])
        ),
        min_size=1,
        max_size=30,
    )
)
def test_five_documents_are_never_enough(cases: list[tuple[str, float, float]]) -> None:
    documents, mine, other = zip(*cases, strict=True)
    p = sign_flip_p(mine, other, documents)
    assert 0.05 < p <= 1.0
    assert p == sign_flip_p(other, mine, documents)
    assert sign_flip_p(mine, mine, documents) == 1.0


@pytest.mark.parametrize(("wins", "losses"), [(4, 0), (6, 0), (9, 2), (12, 1), (40, 21)])
def test_single_lines_are_the_exact_test_of_mcnemar(wins: int, losses: int) -> None:
    mine = [1.0] * wins + [0.0] * losses + [1.0, 0.0] * 20
    other = [0.0] * wins + [1.0] * losses + [1.0, 0.0] * 20
    exact = binomtest(wins, wins + losses).pvalue
    assert sign_flip_p(mine, other) == pytest.approx(exact, rel=1e-9 if wins < 13 else 0.2)


def test_a_difference_is_paired_by_case() -> None:
    one, other = [1.0, 0.0] * 100, [1.0, 0.0] * 90 + [0.0, 0.0] * 10
    difference = paired_difference(one, other)
    assert (
        difference.mean == pytest.approx(0.05)
        and 0 < difference.low < 0.05 < difference.high < 0.09
    )
    reverse = paired_difference(other, one)
    assert (reverse.low, reverse.high) == (
        pytest.approx(-difference.high),
        pytest.approx(-difference.low),
    )
