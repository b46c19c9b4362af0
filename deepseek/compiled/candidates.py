"""Candidates of LSH attention in the compiled step: which cached keys a query attends to.

Pages hold the bucket of each key. A query looks for its buckets from the newest page to the oldest,
64 codes at a time, until it has found as many keys as the bucket window holds. So there is no state
beside the pages to keep, share or rewind. The candidates are a set of bits, which unites rounds of
hashing, and are listed in the order of their positions, whatever bucket they were found in. The
reference is `kernels/lsh/reference.py`.
"""

import numpy as np

from deepseek.compiled.abi import PAGE
from deepseek.compiled.bits import count_bits, lowest_bit, matches, prefetch
from deepseek.kernels.numba.subroutine import subroutine


@subroutine(error_model="numpy")
def _first_slots(count):  # type: ignore[no-untyped-def]
    """Return the set of a page's first `count` tokens, 0 to 64."""
    return np.int64(-1) if count >= PAGE else (np.int64(1) << count) - np.int64(1)


@subroutine(error_model="numpy")
def _add_range(chosen, first, stop):  # type: ignore[no-untyped-def]
    """Add positions `first` to `stop - 1`."""
    for page in range(first // PAGE, (stop + PAGE - 1) // PAGE):
        start = page * PAGE
        before = _first_slots(max(first - start, 0))
        chosen[page] |= _first_slots(stop - start) & ~before


@subroutine(error_model="numpy")
def _add_bucket(chosen, pages, offset, code, first, stop, window):  # type: ignore[no-untyped-def]
    """Add the `window` latest of positions `first` to `stop - 1` whose code is `code`.

    The codes of page p are at address `pages[p] + offset`.
    """
    page = (stop - 1) // PAGE
    left = window
    while left > 0 and (page + 1) * PAGE > first:
        found = matches(pages[page] + offset, code) & _first_slots(stop - page * PAGE)
        if page * PAGE < first:
            found &= ~_first_slots(first - page * PAGE)
        if found != 0:
            count = count_bits(found)
            while count > left:
                found &= found - np.int64(1)
                count -= 1
            chosen[page] |= found
            left -= count
        page -= 1


@subroutine(error_model="numpy")
def choose(chosen, pages, offset, probed, rounds, position, sizes):  # type: ignore[no-untyped-def]
    """Set `chosen` to the candidates of the query at `position`, a set of bits for each page up to
    its own.

    Args:
        chosen: int64 for each page; those up to the query's are set.
        pages: addresses of the sequence's pages.
        offset: where a page has the codes of the first round, uint16 `[64]`; those of the other
            rounds follow.
        probed: the buckets that the query probes, round after round, distinct in a round.
        rounds: number of rounds.
        position: position of the query.
        sizes: local window, number of sinks, bucket window.
    """
    local, sinks, window = sizes
    for page in range(position // PAGE + 1):
        chosen[page] = 0
    near = max(0, position + 1 - local)
    _add_range(chosen, near, position + 1)
    _add_range(chosen, 0, min(sinks, near))
    if near <= sinks:
        return
    for n in range(len(probed)):
        place = offset + n * rounds // len(probed) * PAGE * 2
        _add_bucket(chosen, pages, place, probed[n], sinks, near, window)


@subroutine(error_model="numpy")
def list_tokens(chosen, pages, offset, nbytes, positions, tokens):  # type: ignore[no-untyped-def]
    """List the tokens in the sets of a sequence's pages in order, and prefetch their memory; return
    their number.

    Args:
        chosen: the set of each page.
        pages: addresses of at least as many pages.
        offset: where the first token lies in a page.
        nbytes: bytes of a token.
        positions: positions of the tokens, which are set.
        tokens: addresses of the tokens, which are set.
    """
    count = 0
    for page in range(len(chosen)):
        rest = chosen[page]
        start = pages[page] + offset
        while rest != 0:
            slot = lowest_bit(rest)
            rest &= rest - np.int64(1)
            positions[count] = page * PAGE + slot
            tokens[count] = start + slot * nbytes
            for line in range(0, nbytes, 64):
                prefetch(tokens[count] + line)
            count += 1
    return count
