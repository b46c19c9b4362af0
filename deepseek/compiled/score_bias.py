"""Biases of attention scores in the compiled step: ALiBi, and dynamic positions.

The reference is `model/positions/dynamic.py`, whose symbols are used here. kappa, the running sum
of the forget gates, is stored in the pages behind a layer's keys and values: in fp32, relative to
an fp64 origin of the page, so that differences stay exact however long the text is.
"""

import numpy as np

from deepseek.compiled.abi import PAGE
from deepseek.compiled.pages import kappa
from deepseek.kernels.bias.distance import STARTS
from deepseek.kernels.numba.primitives import share
from deepseek.kernels.numba.subroutine import subroutine

_STARTS = np.array([*STARTS, 2**62])


@subroutine(fastmath=True, error_model="numpy")
def _add_scaled(out, factor, x):  # type: ignore[no-untyped-def]
    for k in range(len(out)):
        out[k] += factor * x[k]


@subroutine(error_model="numpy")
def _place_tables(weights, work, layer, r):  # type: ignore[no-untyped-def]
    """Compute the bias by distance t of a row's scores."""
    contexts = weights.bias_tables.shape[2] - 1
    tables = work.distance_bias[r]
    tables[:] = weights.bias_tables[layer, :, 0]
    for m in range(contexts):
        context = np.float32(np.tanh(work.signals[r, m] + weights.signal_bias[layer, m]))
        for head in range(len(tables)):
            _add_scaled(tables[head], context, weights.bias_tables[layer, head, 1 + m])


@subroutine(error_model="numpy")
def _softplus(x):  # type: ignore[no-untyped-def]
    return max(x, np.float32(0)) + np.float32(np.log1p(np.exp(-abs(x))))


@subroutine(error_model="numpy")
def _place_sums(weights, batch, work, layer, chunk, head):  # type: ignore[no-untyped-def]
    """Append kappa of a chunk's tokens to its pages."""
    signal = weights.bias_tables.shape[2] - 1 + head
    bias = weights.signal_bias[layer, signal]
    decay = weights.decay[layer, head]
    for r in range(batch.first_row[chunk], batch.first_row[chunk + 1]):
        position = batch.position_ids[r]
        slot = position % PAGE
        sums, start = kappa(weights, batch, chunk, position // PAGE, layer, head)
        if slot:
            before = sums[slot - 1]
        else:
            before = np.float32(0)
            start[0] = 0
            if position:
                last, origin = kappa(weights, batch, chunk, position // PAGE - 1, layer, head)
                start[0] = origin[0] + last[PAGE - 1]
        sums[slot] = before + _softplus(work.signals[r, signal] + bias) * decay


@subroutine(error_model="numpy")
def place_bias(weights, batch, work, layer):  # type: ignore[no-untyped-def]
    """Compute the dynamic bias of the new tokens: tables of the queries, kappa of the keys."""
    heads = weights.bias_tables.shape[1]
    if heads == 0:
        return
    first, last = share(len(batch.input_ids))
    for r in range(first, last):
        _place_tables(weights, work, layer, r)
    first, last = share((len(batch.first_row) - 1) * heads)
    for item in range(first, last):
        _place_sums(weights, batch, work, layer, item // heads, item % heads)


@subroutine(fastmath=True, error_model="numpy")
def _add_ramp(scores, slope, distance):  # type: ignore[no-untyped-def]
    """Add `slope` times the negative distance, which is `distance` for the first score."""
    for j in range(len(scores)):
        scores[j] += slope * np.float32(j - distance)


@subroutine(fastmath=True, error_model="numpy")
def _add_sums(scores, sums, shift):  # type: ignore[no-untyped-def]
    for j in range(len(sums)):
        scores[j] += sums[j] + shift


@subroutine(error_model="numpy")
def _add(scores, value):  # type: ignore[no-untyped-def]
    for j in range(len(scores)):
        scores[j] += value


@subroutine(error_model="numpy")
def _add_table(scores, table):  # type: ignore[no-untyped-def]
    """Add the bias by distance; the last score is at distance 0.

    The keys of one bucket are neighbours.
    """
    stop = len(scores)
    bucket = 0
    while stop > 0:
        start = max(len(scores) - _STARTS[bucket + 1], 0)
        _add(scores[start:stop], table[bucket])
        stop = start
        bucket += 1


@subroutine(error_model="numpy")
def has_bias(weights):  # type: ignore[no-untyped-def]
    """Whether scores have a bias."""
    return len(weights.slopes) > 0 or weights.bias_tables.shape[1] > 0


@subroutine(error_model="numpy")
def add_bias(weights, batch, work, layer, chunk, r, head, low, scores):  # type: ignore[no-untyped-def]
    """Add the bias of the query of row `r` to its scores of whole pages, from page `low` on."""
    position = batch.position_ids[r]
    if len(weights.slopes):
        _add_ramp(scores, weights.slopes[head], position - low * PAGE)
    if weights.bias_tables.shape[1] == 0:
        return
    sums, start = kappa(weights, batch, chunk, position // PAGE, layer, head)
    own = start[0] + sums[position % PAGE]
    for page in range(low, position // PAGE + 1):
        sums, start = kappa(weights, batch, chunk, page, layer, head)
        _add_sums(scores[(page - low) * PAGE :], sums, np.float32(start[0] - own))
    _add_table(scores[: position + 1 - low * PAGE], work.distance_bias[r, head])


@subroutine(fastmath=True, error_model="numpy")
def _add_slope(scores, slope, position, positions):  # type: ignore[no-untyped-def]
    for n in range(len(positions)):
        scores[n] += slope * np.float32(positions[n] - position)


@subroutine(error_model="numpy")
def add_bias_at(weights, batch, work, layer, chunk, r, head, positions, scores):  # type: ignore[no-untyped-def]
    """Add the bias of the query of row `r` to its scores of the keys at `positions`, in order."""
    position = batch.position_ids[r]
    if len(weights.slopes):
        _add_slope(scores, weights.slopes[head], position, positions)
    if weights.bias_tables.shape[1] == 0:
        return
    sums, start = kappa(weights, batch, chunk, position // PAGE, layer, head)
    own = start[0] + sums[position % PAGE]
    table = work.distance_bias[r, head]
    bucket = 0
    for n in range(len(positions) - 1, -1, -1):
        key = positions[n]
        sums, start = kappa(weights, batch, chunk, key // PAGE, layer, head)
        while position - key >= _STARTS[bucket + 1]:
            bucket += 1
        scores[n] += sums[key % PAGE] + np.float32(start[0] - own) + table[bucket]
