"""Tiled kernels of `score_bias.py`, on torch's own threads and BLAS.

Along a row of a tile, the distance falls by one from key to key, so the keys of one bucket are
contiguous. A far tile has one or two such runs in a row, and adding the table costs one addition
per element. The keys' own terms are taken relative to the tile's last query, so fp32 suffices for
the exponents.
"""

from functools import cache

import numpy as np
from torch import Tensor

from deepseek.kernels.bias.distance import STARTS
from deepseek.kernels.numba.launch import compiled, launch, unpack
from deepseek.kernels.numba.matrix_product import product
from deepseek.kernels.numba.primitives import exp, thread_count, thread_number
from deepseek.kernels.numba.subroutine import subroutine

QUERIES, KEYS = 128, 256  # of a tile; its scores and both factors fit in 512 KB of cache

_ENDS = np.array([*STARTS[1:], 2**62])  # first distance past each bucket
# Bucket of each distance, up to the start of the last bucket.
_BUCKET = np.searchsorted(_ENDS, np.arange(STARTS[-1] + 1), side="right")
_LOWEST = np.float32(-1e30)
# Weights below exp(_NOTHING) are set to 0; as denormals they would slow BLAS down.
_NOTHING = np.float32(-60)


@subroutine(fastmath=True)
def _add(row, slope, value):  # type: ignore[no-untyped-def]
    """Add slopes and a value to a row of scores."""
    for j in range(len(row)):  # starts at 0, so that the compiler vectorises it
        row[j] += slope[j] + value


@subroutine(fastmath=True)
def _add_bias(row, table, slope, distance):  # type: ignore[no-untyped-def]
    """Add the bias to the scores of consecutive keys, the last of which is at `distance`."""
    stop = len(row)
    bucket = _BUCKET[min(distance, len(_BUCKET) - 1)]
    while stop > 0:
        start = max(len(row) + distance - _ENDS[bucket], 0)
        _add(row[start:stop], slope[start:stop], table[bucket])
        stop = start
        bucket = bucket + 1


@subroutine(fastmath=True)
def _largest(row):  # type: ignore[no-untyped-def]
    largest = row[0]
    for j in range(1, len(row)):
        largest = max(largest, row[j])
    return largest


@subroutine(fastmath=True, inline="always")
def _weight(score):  # type: ignore[no-untyped-def]
    """Return exp(score), or 0 for scores below `_NOTHING`."""
    return exp(score) if score > _NOTHING else np.float32(0)


@subroutine(fastmath=True)
def _exponentials(row, shift):  # type: ignore[no-untyped-def]
    """Replace scores by exp(score - shift); return their sum."""
    total = np.float32(0)
    for j in range(len(row)):
        row[j] = _weight(row[j] - shift)
        total += row[j]
    return total


@subroutine(fastmath=True)
def _multiply(row, factor):  # type: ignore[no-untyped-def]
    for j in range(len(row)):
        row[j] *= factor


@subroutine
def _clear(row, low, high):  # type: ignore[no-untyped-def]
    """Zero the elements outside low to high - 1."""
    for j in range(low):
        row[j] = 0
    for j in range(high, len(row)):
        row[j] = 0


@subroutine
def _slopes(slope, start, stop, reference, out):  # type: ignore[no-untyped-def]
    """Set `out` to the keys' terms relative to `reference`, in fp32."""
    for j in range(start, stop):
        out[j - start] = np.float32(slope[j] - reference)


@subroutine
def _limits(first, slot, start, stop):  # type: ignore[no-untyped-def]
    """Return the range of columns that the query in `slot` sees in the tile of keys `start` to
    `stop` - 1.
    """
    low = min(max(first - start, 0), stop - start)
    return low, max(min(slot + 1, stop) - start, low)


@subroutine(fastmath=True)
def _query_tile(q, k, v, table, slope, first, past, begin, end, out, lse, scores, bias):  # type: ignore[no-untyped-def]
    """Compute attention of queries begin to end - 1 of one head, with an online softmax over tiles
    of keys.
    """
    largest = np.full(end - begin, _LOWEST)
    total = np.zeros(end - begin, np.float32)
    out[begin:end] = 0
    last = past + end
    for start in range(first[begin:end].min(), last, KEYS):
        stop = min(start + KEYS, last)
        tile = scores[: end - begin, : stop - start]
        product(q[begin:end], False, k[start:stop], True, tile)
        _slopes(slope, start, stop, slope[last - 1], bias)
        for t in range(begin, end):
            low, high = _limits(first[t], past + t, start, stop)
            # A row of the whole buffer: numba knows that it is contiguous.
            row, i = (scores[t - begin, : stop - start], t - begin)
            if high > low:
                _add_bias(row[low:high], table[t], bias[low:high], past + t - start - high + 1)
                peak = max(_largest(row[low:high]), largest[i])
                if peak > largest[i]:
                    shrink = _weight(largest[i] - peak)
                    _multiply(out[t], shrink)
                    total[i] = total[i] * shrink
                    largest[i] = peak
                total[i] += _exponentials(row[low:high], peak)
            _clear(row, low, high)
        product(tile, False, v[start:stop], False, out[begin:end], 1)
    for t in range(begin, end):
        _multiply(out[t], np.float32(1) / total[t - begin])
        lse[t] = largest[t - begin] + np.log(total[t - begin])


@subroutine
def _forward(q, k, v, table, slope, first, out, lse):  # type: ignore[no-untyped-def]
    """Compute this thread's tiles of queries, assigned round-robin because neighbours cost about
    the same.
    """
    batch, heads, length, _ = q.shape
    past = k.shape[2] - length
    repeats = heads // k.shape[1]
    tiles = (length + QUERIES - 1) // QUERIES
    scores = np.empty((QUERIES, KEYS), np.float32)
    bias = np.empty(KEYS, np.float32)
    for unit in range(thread_number(), batch * heads * tiles, thread_count()):
        b = unit % batch
        h = unit // batch % heads
        begin = unit // (batch * heads) * QUERIES
        end = min(begin + QUERIES, length)
        g = h // repeats
        _query_tile(
            q[b, h],
            k[b, g],
            v[b, g],
            table[b, h],
            slope[b, h],
            first[b],
            past,
            begin,
            end,
            out[b, h],
            lse[b, h],
            scores,
            bias,
        )


@subroutine(fastmath=True)
def _sum(row):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for j in range(len(row)):
        total += row[j]
    return total


@subroutine(fastmath=True)
def _add_table_gradient(row, distance, out):  # type: ignore[no-untyped-def]
    """Sum the gradients of consecutive keys by bucket; the last key is at `distance`."""
    stop = len(row)
    bucket = _BUCKET[min(distance, len(_BUCKET) - 1)]
    while stop > 0:
        start = max(len(row) + distance - _ENDS[bucket], 0)
        out[bucket] += _sum(row[start:stop])
        stop = start
        bucket = bucket + 1


@subroutine(fastmath=True)
def _row_backward(row, grad, lse, delta, slope_grad):  # type: ignore[no-untyped-def]
    """Replace scores in `row` by weights, and gradients of weights in `grad` by gradients of
    scores.
    """
    for j in range(len(row)):
        weight = _weight(row[j] - lse)
        change = weight * (grad[j] - delta)
        row[j] = weight
        grad[j] = change
        slope_grad[j] += change


@subroutine(fastmath=True)
def _head_backward(q, k, v, table, slope, first, lse, delta, grad, dq, dk, dv, dt, ds):  # type: ignore[no-untyped-def]
    """Compute the gradients of one head, tile by tile."""
    length = len(q)
    past = len(k) - len(q)
    scores = np.empty((QUERIES, KEYS), np.float32)
    grads = np.empty((QUERIES, KEYS), np.float32)
    bias = np.empty(KEYS, np.float32)
    sums = np.empty(KEYS, np.float32)
    for begin in range(0, length, QUERIES):
        end = min(begin + QUERIES, length)
        last = past + end
        for start in range(first[begin:end].min(), last, KEYS):
            stop = min(start + KEYS, last)
            tile = scores[: end - begin, : stop - start]
            change = grads[: end - begin, : stop - start]
            product(q[begin:end], False, k[start:stop], True, tile)
            product(grad[begin:end], False, v[start:stop], True, change)
            _slopes(slope, start, stop, slope[last - 1], bias)
            sums[:] = 0
            for t in range(begin, end):
                low, high = _limits(first[t], past + t, start, stop)
                row = scores[t - begin, : stop - start]
                other = grads[t - begin, : stop - start]
                if high > low:
                    distance = past + t - start - high + 1
                    _add_bias(row[low:high], table[t], bias[low:high], distance)
                    _row_backward(row[low:high], other[low:high], lse[t], delta[t], sums[low:high])
                    _add_table_gradient(other[low:high], distance, dt[t])
                _clear(row, low, high)
                _clear(other, low, high)
            for j in range(start, stop):
                ds[j] += sums[j - start]
            product(tile, True, grad[begin:end], False, dv[start:stop], 1)
            product(change, False, k[start:stop], False, dq[begin:end], 1)
            product(change, True, q[begin:end], False, dk[start:stop], 1)


@subroutine
def _backward(q, k, v, table, slope, first, lse, delta, grad, dq, dk, dv, dt, ds):  # type: ignore[no-untyped-def]
    """Compute this thread's heads; whole heads, so that no two threads add to the same gradient."""
    batch, heads = q.shape[:2]
    repeats = heads // k.shape[1]
    for unit in range(thread_number(), batch * heads, thread_count()):
        b = unit // heads
        h = unit % heads
        g = h // repeats
        _head_backward(
            q[b, h],
            k[b, g],
            v[b, g],
            table[b, h],
            slope[b, h],
            first[b],
            lse[b, h],
            delta[b, h],
            grad[b, h],
            dq[b, h],
            dk[b, h],
            dv[b, h],
            dt[b, h],
            ds[b, h],
        )


@cache
def _forward_kernel(kinds: str) -> int:
    return compiled(lambda data: _forward(*unpack(data, kinds)))


@cache
def _backward_kernel(kinds: str) -> int:
    return compiled(lambda data: _backward(*unpack(data, kinds)))


def forward(
    query_BHTK: Tensor,
    key_BGSK: Tensor,
    value_BGSK: Tensor,
    table_BHTN: Tensor,
    slope_BHS: Tensor,
    first_BT: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the attended values and each row's log-sum-exp, the latter up to a constant of the
    row's tile.

    All tensors are contiguous, and fp32 unless noted.

    Args:
        query_BHTK: queries, already scaled.
        key_BGSK, value_BGSK: keys and values.
        table_BHTN: bias of each query and bucket of distance.
        slope_BHS: term of each key, fp64.
        first_BT: slot of the first visible key of each query, int64.
    """
    out_BHTK = query_BHTK.new_empty(query_BHTK.shape)
    lse_BHT = query_BHTK.new_empty(query_BHTK.shape[:3])
    launch(
        _forward_kernel,
        query_BHTK,
        key_BGSK,
        value_BGSK,
        table_BHTN,
        slope_BHS,
        first_BT,
        out_BHTK,
        lse_BHT,
    )
    return out_BHTK, lse_BHT


def backward(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of `forward`'s first five inputs.

    Args:
        tensors: inputs of `forward`, its outputs, and the gradient of the attended values.
    """
    *inputs, out_BHTK, lse_BHT, grad_BHTK = tensors
    query, key, value, table, slope, _ = inputs
    heads = query.shape[1]
    groups = key.shape[1]
    delta_BHT = (out_BHTK * grad_BHTK).sum(-1)
    per_head = [
        part.new_zeros(part.shape[0], heads, *part.shape[2:])
        for part in (query, key, value, table, slope)
    ]
    launch(_backward_kernel, *inputs, lse_BHT, delta_BHT, grad_BHTK, *per_head)
    dq, dk, dv, dt, ds = per_head
    dk, dv = (part.unflatten(1, (groups, heads // groups)).sum(2) for part in (dk, dv))
    return dq, dk, dv, dt, ds
