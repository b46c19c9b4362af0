"""Buckets of causal distance: one for each short distance, half-octave ranges for longer ones."""

import torch
from torch import Tensor

EXACT = 16
"""Distances 0 to 15 have a bucket each; above, each bucket ends at about sqrt(2) times its
start.
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
"""First distance of each bucket; the last bucket is unbounded. Integers, so that no rounding shifts
a boundary.
"""

NUM_BUCKETS = len(STARTS)


def distance_buckets(distance: Tensor) -> Tensor:
    """Return the bucket (int64, 0 to 31) of each distance.

    Args:
        distance: causal distances query - key, in tokens; negative ones are in bucket 0.
    """
    starts = torch.tensor(STARTS[1:], device=distance.device)
    return torch.bucketize(distance, starts, right=True)
