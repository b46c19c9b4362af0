"""A random order of n items that needs no memory: a keyed Feistel network with cycle walking."""

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6
"""Four rounds are pseudo-random in theory (Luby and Rackoff 1988); two more cover the short halves of a small n."""

GOLDEN = 0x9E3779B97F4A7C15
MASK_64 = (1 << 64) - 1


def mix(value: int) -> int:
    """Return a well-mixed 64-bit number (splitmix64's finaliser, Steele et al. 2014)."""
    value = (value + GOLDEN) & MASK_64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK_64
    return value ^ (value >> 31)


def permute(positions: NDArray[np.int64], size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return where each of `positions` (all in [0, size)) goes in the order of `epoch`; a bijection of [0, size)."""
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    keys = [mix(mix(mix(seed & MASK_64) ^ epoch) + index) for index in range(ROUNDS)]
    values = feistel(positions.astype(np.uint64), half, keys)
    outside = values >= size
    while outside.any():  # at most a few turns: the network's domain is below four times `size`
        values[outside] = feistel(values[outside], half, keys)
        outside = values >= size
    return values.astype(np.int64)


def endless(start: int, stop: int, size: int, seed: int) -> NDArray[np.int64]:
    """Return the items at places [start, stop) of an endless sequence: epoch after epoch, each of `size` items once."""
    epochs, within = np.divmod(np.arange(start, stop, dtype=np.int64), size)
    parts = [permute(within[epochs == epoch], size, seed, int(epoch)) for epoch in np.unique(epochs)]
    return np.concatenate([within[:0], *parts])


def feistel(values: NDArray[np.uint64], half: int, keys: list[int]) -> NDArray[np.uint64]:
    """Return a bijection of [0, 4**half) applied to `values`."""
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (scramble(right ^ np.uint64(key)) & mask)
    return (left << shift) | right


def scramble(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return well-mixed numbers; products wrap on purpose."""
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> np.uint64(33))
