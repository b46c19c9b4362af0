"""Scores of predicted lines, and their confidence intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

import numpy as np

CONFIDENCE_Z = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""

RESAMPLES = 2000
"""Bootstrap samples."""

SIGN_FLIPS = 1 << 14
"""Maximum ways to swap two systems: all are tried, or this many drawn at random."""

ROUNDING = 1e-9
"""Score differences below this count as 0."""


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % confidence interval."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


def is_exact(written: str, target: str) -> bool:
    """Return whether a line equals the target, except for whitespace at its ends."""
    return written.strip() == target.strip()


def edit_similarity(written: str, target: str) -> float:
    """Return twice the length of the matching blocks over that of both lines (`difflib`), 1.0 if
    equal.
    """
    return SequenceMatcher(None, written.strip(), target.strip(), autojunk=False).ratio()


def wilson(right: int, total: int) -> Interval:
    """Return a share with its Wilson score interval (1927, doi:10.1080/01621459.1927.10502953)."""
    if total == 0:
        return Interval(0.0, 0.0, 1.0)
    share = right / total
    z = CONFIDENCE_Z
    middle = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return Interval(
        share,
        max(0.0, min(share, (middle - half) / scale)),
        min(1.0, max(share, (middle + half) / scale)),
    )


def paired_difference(
    mine: Sequence[float],
    other: Sequence[float],
    seed: int = 0,
    documents: Sequence[str] | None = None,
) -> Interval:
    """Return the mean of `mine - other`, paired by case, with its bootstrap interval (Efron 1979).

    Both are resampled with the same cases, so that the difficulty of cases doesn't widen the
    interval. Cases of one document are alike: with `documents`, whole documents are resampled
    (Davison and Hinkley 1997, section 3.8). With fewer than about ten of them the interval is too
    narrow.

    Args:
        mine: a score of each case.
        other: the score of the same cases that it is compared with.
        seed: seed of the resampling.
        documents: document that each case comes from; None, or the same for all: the cases are
            independent.
    """
    difference_N = np.asarray(mine, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    count = len(difference_N)
    if count == 0:
        return Interval(0.0, 0.0, 0.0)
    number_N = np.arange(count)
    if documents is not None and len(set(documents)) > 1:
        _, number_N = np.unique(documents, return_inverse=True)
    sums_G = np.bincount(number_N, weights=difference_N)
    sizes_G = np.bincount(number_N)
    generator = np.random.default_rng(seed)
    chosen_RG = generator.integers(0, len(sizes_G), (RESAMPLES, len(sizes_G)))
    means_R = sums_G[chosen_RG].sum(axis=1) / sizes_G[chosen_RG].sum(axis=1)
    low, high = np.percentile(means_R, [2.5, 97.5])
    return Interval(float(difference_N.mean()), float(low), float(high))


def sign_flip_p(
    mine: Sequence[float],
    other: Sequence[float],
    documents: Sequence[str] | None = None,
    seed: int = 0,
) -> float:
    """Return the two-sided p-value of a difference paired by case: the share of all ways to swap
    `mine` and `other`, document by document, that make it as large (Fisher 1935, section 21).

    It is valid for any number of documents, whereas a bootstrap over few of them is overconfident:
    with five or fewer it is never below 0.05.

    Args:
        mine: a score of each case.
        other: the score of the same cases that it is compared with.
        documents: document that each case comes from, of which all cases are swapped together;
            None: each case by itself.
        seed: seed of the ways drawn, where there are too many to try all.
    """
    difference_N = np.asarray(mine, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    number_N = np.arange(len(difference_N))
    if documents is not None:
        _, number_N = np.unique(documents, return_inverse=True)
    sums_G = np.bincount(number_N, weights=difference_N)
    sums_G = sums_G[np.abs(sums_G) > ROUNDING]
    count = len(sums_G)
    if 2**count <= SIGN_FLIPS:
        signs_RG = 1 - 2 * (np.arange(2**count)[:, None] >> np.arange(count) & 1)
        drawn = 0
    else:
        signs_RG = np.random.default_rng(seed).choice((-1, 1), (SIGN_FLIPS, count))
        drawn = 1  # the measured assignment counts, too (Phipson and Smyth 2010)
    as_large = np.abs(signs_RG @ sums_G) >= abs(sums_G.sum()) - ROUNDING
    return float((as_large.sum() + drawn) / (len(signs_RG) + drawn))
