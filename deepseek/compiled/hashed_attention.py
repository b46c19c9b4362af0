"""LSH attention over pages: a query attends to its candidates, token by token.

The reference is `model/attention/lsh.py`. Each query at a head is computed separately, over its
candidates in the order of their positions, so that its bits depend on the tokens before it alone.
"""

import numpy as np
from numba import carray

from deepseek.compiled.abi import (
    BUCKETS,
    FAR_FIELD,
    KEY_MAPS,
    LOCAL,
    PAGE,
    PROBES,
    QUERY_MAPS,
    ROUNDS,
    SINKS,
    SYNC_STRIDE,
    WINDOW,
)
from deepseek.compiled.candidates import choose, list_tokens
from deepseek.compiled.far_field import SUMMARIES, summarise
from deepseek.compiled.pages import codes_address, token_row
from deepseek.compiled.rows import put_attended
from deepseek.compiled.score_bias import add_bias_at
from deepseek.compiled.token_dot import TOKENS, mix_tokens, score_buckets, score_tokens
from deepseek.compiled.vector import arrive
from deepseek.kernels.numba.primitives import exp, pointer
from deepseek.kernels.numba.subroutine import subroutine


@subroutine
def _rank(scores, best, codes):  # type: ignore[no-untyped-def]
    """Set `best` to the largest scores, largest first, and `codes` to their places.

    The best so far are kept sorted. Most scores need only one comparison, with the last of them.
    """
    probes = len(codes)
    best[:] = -np.inf
    codes[:] = 0
    least = best[probes - 1]
    for c in range(len(scores)):
        score = scores[c]
        if score > least:
            p = probes - 1
            while p > 0 and score > best[p - 1]:
                best[p] = best[p - 1]
                codes[p] = codes[p - 1]
                p -= 1
            best[p] = score
            codes[p] = c
            least = best[probes - 1]


@subroutine(error_model="numpy")
def _find_buckets(weights, layer, place, x, r, codes):  # type: ignore[no-untyped-def]
    """Set `codes` to the likeliest buckets of `x` in round `r`, by map `place` of the layer."""
    lsh = weights.lsh
    place += r * (lsh[QUERY_MAPS] + lsh[KEY_MAPS])
    buckets = lsh[BUCKETS]
    scores = np.empty(buckets, np.float32)
    matrix = weights.hashes[layer] + place * (len(x) + 1) * buckets * 4
    score_buckets(x.ctypes.data, matrix, len(x), buckets, scores.ctypes.data)
    _rank(scores, np.empty(len(codes), np.float32), codes)


@subroutine(error_model="numpy")
def place_query_codes(weights, work, layer, r, head, x):  # type: ignore[no-untyped-def]
    """Find the buckets that a query probes; `x` is the query before positions, unscaled."""
    probes = weights.lsh[PROBES]
    own = head % weights.lsh[QUERY_MAPS]
    for j in range(weights.lsh[ROUNDS]):
        codes = work.query_codes[r, head, j * probes : (j + 1) * probes]
        _find_buckets(weights, layer, own, x, j, codes)


@subroutine(error_model="numpy")
def place_key_codes(weights, batch, chunk, position, layer, group, x):  # type: ignore[no-untyped-def]
    """Store the buckets of a key in its page; `x` is the key before positions."""
    own = weights.lsh[QUERY_MAPS] + group % weights.lsh[KEY_MAPS]
    found = np.empty(1, np.int64)
    at = codes_address(weights, batch, chunk, position // PAGE, layer, group)
    codes = carray(pointer(at), (weights.lsh[ROUNDS], PAGE), np.uint16)
    for j in range(len(codes)):
        _find_buckets(weights, layer, own, x, j, found)
        codes[j, position % PAGE] = np.uint16(found[0])


@subroutine
def _whole_blocks(count):  # type: ignore[no-untyped-def]
    """Return a number of tokens, rounded up to a multiple of `TOKENS`."""
    return (count + TOKENS - 1) // TOKENS * TOKENS


@subroutine(fastmath=True, error_model="numpy")
def _softmax(scores):  # type: ignore[no-untyped-def]
    """Replace scores by weights; return the reciprocal of their sum."""
    largest = scores[0]
    for s in range(len(scores)):
        largest = max(largest, scores[s])
    total = np.float32(0)
    for s in range(len(scores)):
        value = exp(scores[s] - largest)
        scores[s] = value
        total += value
    return np.float32(1) / total


@subroutine(fastmath=True, error_model="numpy")
def _add(out, weight, value):  # type: ignore[no-untyped-def]
    for k in range(len(out)):
        out[k] += weight * value[k]


@subroutine(error_model="numpy")
def _attend_query(weights, batch, work, layer, r, head, space):  # type: ignore[no-untyped-def]
    """Compute the attention of row `r` at one head."""
    chosen, positions, tokens, scores, values, query, out = space
    position = batch.position_ids[r]
    chunk = batch.chunk_of_row[r]
    group_heads = weights.heads // weights.groups
    group = head // group_heads
    lsh = weights.lsh
    sizes = (lsh[LOCAL], lsh[SINKS], lsh[WINDOW])
    pages = batch.pages[batch.part_of_layer[layer], chunk]
    codes = codes_address(weights, batch, chunk, 0, layer, group) - pages[0]
    choose(chosen, pages, codes, work.query_codes[r, head], lsh[ROUNDS], position, sizes)
    width = weights.page_width
    first = token_row(weights, batch, chunk, 0, layer, group) - pages[0]
    listed = chosen[: position // PAGE + 1]
    count = list_tokens(listed, pages, first, 4 * width, positions, tokens)
    query[: weights.width] = work.queries[group, r, head % group_heads]
    addresses = tokens.ctypes.data
    # Tokens are scored in whole blocks; the last block is padded with the last token.
    blocks = _whole_blocks(count)
    tokens[count:blocks] = tokens[count - 1]
    score_tokens(query.ctypes.data, addresses, blocks, width, scores.ctypes.data)
    add_bias_at(weights, batch, work, layer, chunk, r, head, positions[:count], scores)
    far = 0
    if lsh[FAR_FIELD]:
        full = max(0, position + 1 - sizes[0]) // PAGE
        far = summarise(weights, batch, chunk, layer, group, full, query, scores[count:], values)
    factor = _softmax(scores[: count + far])
    mix_tokens(scores.ctypes.data, addresses, count, 2 * width, width, out.ctypes.data)
    for f in range(far):
        _add(out, scores[count + f], values[f])
    for k in range(len(out)):
        out[k] *= factor
    put_attended(weights, work, r, head, out)


@subroutine(error_model="numpy")
def attend_hashed(weights, batch, work, layer):  # type: ignore[no-untyped-def]
    """Compute the attention of queries until none is left, taking them from a shared counter."""
    span = batch.pages.shape[2] * PAGE
    lsh = weights.lsh
    most = min(span, lsh[LOCAL] + lsh[SINKS] + work.query_codes.shape[2] * lsh[WINDOW])
    space = (
        np.empty(span // PAGE, np.int64),
        np.empty(most, np.int64),
        np.empty(_whole_blocks(most), np.int64),
        np.empty(_whole_blocks(most) + SUMMARIES, np.float32),
        np.empty((SUMMARIES if lsh[FAR_FIELD] else 0, weights.page_width), np.float32),
        np.zeros(weights.page_width, np.uint16),
        np.empty(weights.page_width, np.float32),
    )
    counter = work.sync[SYNC_STRIDE * (1 + layer) :].ctypes.data
    total = len(batch.input_ids) * weights.heads
    unit = arrive(counter, 1)
    while unit < total:
        row = unit // weights.heads
        _attend_query(weights, batch, work, layer, row, unit % weights.heads, space)
        unit = arrive(counter, 1)
