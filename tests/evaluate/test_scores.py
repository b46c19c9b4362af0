"""Intervals and scores of lines."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek.evaluate.scores import edit_similarity, is_exact, paired_difference, wilson

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
