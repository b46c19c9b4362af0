"""Buckets of causal distance: near keys one by one, far ones by half octaves."""

import torch
from torch import Tensor

EXACT = 16
"""Distances 0 to 15 have a bucket each; beyond, a bucket ends where the distance has grown by the
root of two.
"""

STARTS = (
    *range(EXACT),
    16,
    23,
    32,
    45,
    64,
    91,
    128,
    181,
    256,
    362,
    512,
    724,
    1024,
    1448,
    2048,
    2896,
)
"""First distance of each bucket; the last bucket has no end. Whole numbers, so that no rounding
moves a border.
"""

NUM_BUCKETS = len(STARTS)


def distance_buckets(distance: Tensor) -> Tensor:
    """Return the bucket (int64, 0 to 31) of each causal distance query - key, in tokens; negative
    ones are in 0.
    """
    starts = torch.tensor(STARTS[1:], device=distance.device)
    return torch.bucketize(distance, starts, right=True)
