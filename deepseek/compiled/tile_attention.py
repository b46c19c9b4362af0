"""The products of paged attention by AMX tiles (`kernels/numba/amx.py`): up to 16 queries at once.

In a row of C, each sum runs over 32 elements at a time, in the order of the elements, so it does
not depend on the other rows.
"""

from deepseek.compiled.abi import PAGE
from deepseek.compiled.pages import plane
from deepseek.kernels.int8_layout import GROUP
from deepseek.kernels.numba import amx
from deepseek.kernels.numba.subroutine import subroutine

KEY_STRIDE = PAGE * 4  # bytes between two pairs of elements of a page's keys
VALUE_STRIDE = GROUP * 4  # bytes between two pairs of keys of a page's values
HALF = PAGE // 2  # keys that a tile of probabilities covers


@subroutine(error_model="numpy")
def score_tiles(weights, batch, queries, scores, layer, chunk, group, low, pages, count):  # type: ignore[no-untyped-def]
    """Set `scores` to the products of `count` queries, at address `queries`, with the keys of pages
    `low` to `pages - 1`.

    The width of a head is a multiple of 32.
    """
    width = weights.width
    stride = scores.shape[1] * 4
    amx.configure_rows(count)
    for page in range(low, pages):
        keys = plane(weights, batch, chunk, page, layer, group, 0)
        at = scores.ctypes.data + (page - low) * PAGE * 4
        amx.zero(0)
        amx.zero(1)
        amx.zero(2)
        amx.zero(3)
        for k in range(0, width, 32):
            block = keys + k // 2 * KEY_STRIDE
            amx.load(4, queries + 2 * k, 2 * width)
            amx.load(6, block, KEY_STRIDE)
            amx.add_pairs(0, 4, 6)
            amx.load(7, block + 64, KEY_STRIDE)
            amx.add_pairs(1, 4, 7)
            amx.load(6, block + 128, KEY_STRIDE)
            amx.add_pairs(2, 4, 6)
            amx.load(7, block + 192, KEY_STRIDE)
            amx.add_pairs(3, 4, 7)
        amx.store(0, at, stride)
        amx.store(1, at + 64, stride)
        amx.store(2, at + 128, stride)
        amx.store(3, at + 192, stride)


@subroutine(error_model="numpy")
def mix_tiles(weights, batch, probs, attended, layer, chunk, group, low, ends, count):  # type: ignore[no-untyped-def]
    """Set `attended` to the values at positions `low * PAGE` to `ends - 1`, weighted by `probs`."""
    width = weights.page_width
    stride = probs.shape[1] * 2
    amx.configure_rows(count)
    for part in range(width // GROUP):
        amx.zero(0)
        amx.zero(1)
        amx.zero(2)
        amx.zero(3)
        for start in range(low * PAGE, ends, HALF):
            page = start // PAGE
            values = plane(weights, batch, chunk, page, layer, group, 1)
            block = values + (part * PAGE + start % PAGE) * GROUP * 2
            amx.load(4, probs.ctypes.data + (start - low * PAGE) * 2, stride)
            amx.load(6, block, VALUE_STRIDE)
            amx.add_pairs(0, 4, 6)
            amx.load(7, block + 64, VALUE_STRIDE)
            amx.add_pairs(1, 4, 7)
            amx.load(6, block + 128, VALUE_STRIDE)
            amx.add_pairs(2, 4, 6)
            amx.load(7, block + 192, VALUE_STRIDE)
            amx.add_pairs(3, 4, 7)
        at = attended.ctypes.data + part * GROUP * 4
        amx.store(0, at, 4 * width)
        amx.store(1, at + 64, 4 * width)
        amx.store(2, at + 128, 4 * width)
        amx.store(3, at + 192, 4 * width)
