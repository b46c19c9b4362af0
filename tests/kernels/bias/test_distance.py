"""Distance buckets are exact nearby, monotone, and half an octave wide beyond."""

from itertools import pairwise

import torch

from deepseek.kernels.bias.distance import EXACT, NUM_BUCKETS, STARTS, distance_buckets


def test_near_distances_have_a_bucket_each_and_far_ones_share() -> None:
    buckets = distance_buckets(torch.arange(100_000))
    assert buckets.dtype == torch.int64
    assert buckets[:EXACT].tolist() == list(range(EXACT))
    assert buckets.unique().tolist() == list(range(NUM_BUCKETS))
    assert (buckets.diff() >= 0).all()
    assert [int((buckets == b).nonzero()[0]) for b in range(NUM_BUCKETS)] == list(STARTS)
    assert all(1.3 < b / a < 1.5 for a, b in pairwise(STARTS[EXACT:]))


def test_later_keys_fall_into_the_first_bucket() -> None:
    assert distance_buckets(torch.tensor([[-7, -1], [0, 5000]])).tolist() == [[0, 0], [0, 31]]
