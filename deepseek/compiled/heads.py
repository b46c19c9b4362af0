"""Queries, keys and values of the new tokens: norms, positions, and their places in the pages."""

import numpy as np
from numba import carray

from deepseek.compiled.abi import PAGE
from deepseek.compiled.hashed_attention import place_key_codes, place_query_codes
from deepseek.compiled.pages import plane, token_row
from deepseek.compiled.rows import norm_row
from deepseek.kernels.int8_layout import GROUP
from deepseek.kernels.numba.primitives import narrow, pointer, share, thread_number
from deepseek.kernels.numba.subroutine import subroutine

BFLOAT16 = np.uint16(0)  # a value of the type that stores the bits of bf16


# Numba vectorises a loop only when it can prove that indices are not negative, so loops run over
# whole slices.
@subroutine(fastmath=True, error_model="numpy")
def _rotate_halves(first, second, cosine, sine, factor, left, right):  # type: ignore[no-untyped-def]
    for k in range(len(first)):
        a = first[k]
        b = second[k]
        left[k] = narrow((a * cosine[k] - b * sine[k]) * factor, BFLOAT16)
        right[k] = narrow((b * cosine[k] + a * sine[k]) * factor, BFLOAT16)


@subroutine(error_model="numpy")
def _rotate(weights, layer, position, x, factor, out):  # type: ignore[no-untyped-def]
    """Apply the rotary embedding to a head, multiply by `factor`, and store as bf16."""
    half = len(x) // 2
    angles = weights.rotation[layer]
    cosine = weights.cosine[angles, position]
    sine = weights.sine[angles, position]
    _rotate_halves(x[:half], x[half:], cosine, sine, factor, out[:half], out[half:])


@subroutine(error_model="numpy")
def _narrow(x, bits):  # type: ignore[no-untyped-def]
    """Convert to bf16."""
    for k in range(len(x)):
        bits[k] = narrow(x[k], BFLOAT16)


@subroutine(fastmath=True, error_model="numpy")
def _add(x, bias):  # type: ignore[no-untyped-def]
    for k in range(len(x)):
        x[k] += bias[k]


@subroutine(fastmath=True, error_model="numpy")
def _clip(x, limit):  # type: ignore[no-untyped-def]
    for k in range(len(x)):
        x[k] = min(max(x[k], -limit), limit)


@subroutine(fastmath=True, error_model="numpy")
def _mean_square(x, bias):  # type: ignore[no-untyped-def]
    """Return the mean square of `x + bias`."""
    total = np.float32(0)
    for k in range(len(x)):
        value = x[k] + bias[k]
        total += value * value
    return total / np.float32(len(x))


@subroutine(fastmath=True, error_model="numpy")
def _scale(x, weight, factor):  # type: ignore[no-untyped-def]
    for k in range(len(x)):
        x[k] *= weight[k] * factor


@subroutine(error_model="numpy")
def _norm_width(weights, work, layer, r, part, x):  # type: ignore[no-untyped-def]
    """Normalise head `part` of row `r`, which is in `x`, by the mean square over all query heads,
    or over all key heads.
    """
    is_query = part < weights.heads
    first = 0 if is_query else weights.heads * weights.width
    size = (weights.heads if is_query else weights.groups) * weights.width
    square = _mean_square(
        work.projected[r, first : first + size], weights.qkv_bias[layer, first : first + size]
    )
    start = part * weights.width - first
    scales = weights.head_norms[layer, 0 if is_query else 1, start : start + weights.width]
    _scale(x, scales, np.float32(1) / np.sqrt(square + weights.eps[0]))


@subroutine(error_model="numpy")
def _put_key(rotated, page, slot):  # type: ignore[no-untyped-def]
    """Store a key, given as pairs of bf16 numbers `[K/2]`, in slot `slot` of a page."""
    keys = carray(pointer(page), (len(rotated), PAGE), np.uint32)
    for k in range(len(rotated)):
        keys[k, slot] = rotated[k]


@subroutine(error_model="numpy")
def _put_value(x, page, slot):  # type: ignore[no-untyped-def]
    """Store a value in slot `slot` of a page, as bf16; beyond its width the page stays 0."""
    parts = (len(x) + GROUP - 1) // GROUP
    values = carray(pointer(page), (parts, PAGE // 2, GROUP, 2), np.uint16)
    for part in range(len(values)):
        target = values[part, slot // 2, :, slot % 2]
        source = x[part * GROUP : (part + 1) * GROUP]
        for k in range(len(source)):
            target[k] = narrow(source[k], BFLOAT16)


@subroutine(error_model="numpy")
def _put_row(x, address):  # type: ignore[no-untyped-def]
    """Store bf16 numbers, given as their bits."""
    target = carray(pointer(address), (len(x),), np.uint16)
    for k in range(len(x)):
        target[k] = x[k]


@subroutine(error_model="numpy")
def _read_head(weights, work, layer, r, part, x):  # type: ignore[no-untyped-def]
    """Set `x` to part `part` of row `r` before positions: biased, normed and clamped."""
    heads = weights.heads
    width = weights.width
    normed = weights.head_norms.shape[2] > 0 and part < heads + weights.groups
    # A copy: in place, the head would change while other threads norm over the full width.
    x[:] = work.projected[r, part * width : (part + 1) * width]
    _add(x, weights.qkv_bias[layer, part * width : (part + 1) * width])
    if normed and weights.joint_norm:
        _norm_width(weights, work, layer, r, part, x)
    if weights.clip[0] > 0:
        _clip(x, weights.clip[0])
    if normed and not weights.joint_norm:
        norm_row(x, weights.head_norms[layer, 0 if part < heads else 1], weights.eps[0], x)


@subroutine(error_model="numpy")
def _place_query(weights, batch, work, layer, r, head, x):  # type: ignore[no-untyped-def]
    """Rotate and scale a query."""
    if weights.hashes[layer]:
        place_query_codes(weights, work, layer, r, head, x)
    position = batch.position_ids[r]
    group_heads = weights.heads // weights.groups
    out = work.queries[head // group_heads, r, head % group_heads]
    factor = weights.query_scale[0]
    if weights.length_scale.shape[1]:
        growth = weights.length_scale[layer, head] * weights.growth[position]
        factor *= np.float32(1) + growth
    _rotate(weights, layer, position, x, factor, out)


@subroutine(error_model="numpy")
def _place_key(weights, batch, layer, r, group, x, bits):  # type: ignore[no-untyped-def]
    """Rotate a key and store it in its page; `bits` is overwritten."""
    position = batch.position_ids[r]
    chunk = batch.chunk_of_row[r]
    _rotate(weights, layer, position, x, np.float32(1), bits)
    if weights.hashes[layer]:
        place_key_codes(weights, batch, chunk, position, layer, group, x)
        _put_row(bits, token_row(weights, batch, chunk, position, layer, group))
    else:
        at = plane(weights, batch, chunk, position // PAGE, layer, group, 0)
        _put_key(bits.view(np.uint32), at, position % PAGE)


@subroutine(error_model="numpy")
def _place_value(weights, batch, layer, r, group, x, bits):  # type: ignore[no-untyped-def]
    """Store a value in its page; `bits` is overwritten."""
    position = batch.position_ids[r]
    chunk = batch.chunk_of_row[r]
    if weights.hashes[layer]:
        _narrow(x, bits)
        at = token_row(weights, batch, chunk, position, layer, group)
        _put_row(bits, at + weights.page_width * 2)
    else:
        at = plane(weights, batch, chunk, position // PAGE, layer, group, 1)
        _put_value(x, at, position % PAGE)


@subroutine(error_model="numpy")
def place_heads(weights, batch, work, layer):  # type: ignore[no-untyped-def]
    """Rotate queries and keys, and store keys and values in their pages."""
    heads = weights.heads
    groups = weights.groups
    # A row of `projected` holds the queries of all heads, then keys and values of all groups.
    parts = heads + 2 * groups
    x = work.head[thread_number(), : weights.width]
    bits = work.head_bits[thread_number(), : weights.width]
    first, last = share(len(batch.input_ids) * parts)
    for item in range(first, last):
        r = item // parts
        part = item % parts
        _read_head(weights, work, layer, r, part, x)
        if part < heads:
            _place_query(weights, batch, work, layer, r, part, x)
        elif part < heads + groups:
            _place_key(weights, batch, layer, r, part - heads, x, bits)
        else:
            _place_value(weights, batch, layer, r, part - heads - groups, x, bits)
