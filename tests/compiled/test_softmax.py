"""The softmax of attention scores agrees with NumPy's, and its bits do not depend on its offset."""

import numpy as np
import pytest
from numba import njit

from deepseek.compiled.softmax import softmax
from deepseek.kernels.int8_layout import LANES
from deepseek.kernels.numba.buffers import aligned


@njit
def run(scores, probs, first, stop):
    return softmax(scores.ctypes.data, probs.ctypes.data, first, stop)


def result(values, first):
    """Probabilities and reciprocal sum of values at offset `first`, between other numbers."""
    stop = first + len(values)
    length = -(-stop // LANES) * LANES
    scores = aligned(length * 4).view(np.float32)
    probs = aligned(length * 2).view(np.uint16)
    scores[:] = 1e4
    probs[:] = 1
    scores[first:stop] = values
    factor = run(scores, probs, first, stop)
    assert not probs[first // LANES * LANES : first].any() and not probs[stop:].any()
    return probs[first:stop].copy(), factor


@pytest.mark.parametrize("count", [1, 15, 16, 17, 200])
def test_the_softmax_is_that_of_numpy(count):
    values = np.random.default_rng(count).normal(0, 10, count).astype(np.float32)
    probs, factor = result(values, 0)
    exact = np.exp(values.astype(np.float64) - values.max())
    widened = (probs.astype(np.uint32) << 16).view(np.float32)
    assert np.allclose(widened, exact, rtol=2**-8, atol=1e-37)
    assert np.isclose(factor, 1 / exact.sum(), rtol=1e-6)


def test_the_bits_depend_on_the_place_in_a_vector_alone():
    values = np.random.default_rng(0).normal(0, 3, 100).astype(np.float32)
    for first in (0, 5):
        probs, factor = result(values, first)
        later_probs, later_factor = result(values, first + 3 * LANES)
        assert np.array_equal(probs, later_probs) and factor == later_factor
