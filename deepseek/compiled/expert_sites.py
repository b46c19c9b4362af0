"""Plugged experts in the compiled step: their gates (`model/experts/gate.py`) and their feed-forward networks."""

import numpy as np
from numba import njit

from deepseek.compiled.abi import RECENT
from deepseek.compiled.rows import activate, add_projected, floats, row_bytes
from deepseek.kernels.numba.primitives import share

SHARPNESS = 16.0  # of `model/experts/gate.py`


@njit(error_model="numpy")
def own_members(batch, sites, chunk, layer):  # type: ignore[no-untyped-def]
    """Return the first member of a chunk at a layer and the one past its last."""
    start, stop = batch.member_first[chunk], batch.member_first[chunk + 1]
    while start < stop and batch.members[start] < sites.first[layer]:
        start += 1
    end = start
    while end < stop and batch.members[end] < sites.first[layer + 1]:
        end += 1
    return start, end


@njit(fastmath=True, error_model="numpy")
def _affine(gate, x):  # type: ignore[no-untyped-def]
    total = gate[len(gate) - 1]
    for d in range(len(gate) - 1):
        total += gate[d] * x[d]
    return total


@njit(error_model="numpy")
def score_row(batch, sites, work, layer, r, x):  # type: ignore[no-untyped-def]
    """Score the gate input x of row r for the experts of its sequence."""
    start, end = own_members(batch, sites, batch.chunk[r], layer)
    for member in range(start, end):
        site = batch.members[member]
        for kind in range(2):
            work.scores[r, site - sites.first[layer], kind] = _affine(sites.gates[batch.gates[member], kind], x)


@njit(error_model="numpy")
def weigh(batch, sites, work, layer):  # type: ignore[no-untyped-def]
    """Say how much each expert speaks at each row: running means, then arbitration. Chunks are shared by threads."""
    first, last = share(len(batch.first) - 1)
    for chunk in range(first, last):
        start, end = own_members(batch, sites, chunk, layer)
        count, place = end - start, start - batch.member_first[chunk]
        if count == 0:
            continue
        recent = floats(batch.sums[chunk], RECENT, batch.member_first[chunk + 1] - batch.member_first[chunk], 3)
        detect, claims = np.empty(count, np.float32), np.empty(count, np.float32)
        for r in range(batch.first[chunk], batch.first[chunk + 1]):
            position = batch.positions[r]
            before, sums = recent[(position - 1) % RECENT, place:], recent[position % RECENT, place:]
            for j in range(count):
                site = batch.members[start + j]
                if batch.most[chunk] == 0:
                    work.said[r, site] = 1
                    continue
                for kind in range(3):
                    score = np.float32(1) if kind == 2 else work.scores[r, site - sites.first[layer], kind]
                    sums[j, kind] = before[j, kind] * sites.decay[site] + score if position > 0 else np.float32(0)
                detect[j] = sums[j, 0] / max(sums[j, 2], np.float32(1))
                claims[j] = sums[j, 1] / max(sums[j, 2], np.float32(1))
            if batch.most[chunk] and position > 0:
                _arbitrate(batch.members[start:end], detect, claims, batch.most[chunk], work.said[r])


@njit(error_model="numpy")
def _arbitrate(members, detect, claims, most, said):  # type: ignore[no-untyped-def]
    """Turn smoothed scores into weights; `claims` holds the contrasts and is changed."""
    count = len(members)
    for j in range(count):
        if detect[j] > 0:
            claims[j] -= np.float32(np.log1p(np.exp(-SHARPNESS * detect[j])))
        else:
            claims[j] = -np.inf
    largest, strength, total = np.float32(-np.inf), np.float32(0), np.float32(0)
    for j in range(count):
        rank = 0
        for i in range(count):
            rank += claims[i] > claims[j] or (claims[i] == claims[j] and i < j)
        said[members[j]] = 1 if detect[j] > 0 and rank < most else 0
        if said[members[j]] > 0:
            largest = max(largest, claims[j])
            strength += np.float32(1 / (1 + np.exp(-SHARPNESS * detect[j])))
    for j in range(count):
        said[members[j]] *= np.float32(np.exp(claims[j] - largest)) if said[members[j]] > 0 else np.float32(0)
        total += said[members[j]]
    for j in range(count):
        if said[members[j]] > 0:
            said[members[j]] *= min(np.float32(1), strength) / total


@njit(error_model="numpy")
def _speaking(work, site, table, own, places, factors):  # type: ignore[no-untyped-def]
    """List the rows at which a site speaks: their addresses from `table`, numbers and weights. Return how many."""
    count = 0
    for r in range(len(places)):
        if work.said[r, site] > 0:
            own[count], places[count], factors[count] = table[r], r, work.said[r, site]
            count += 1
    return count


@njit(error_model="numpy")
def activate_experts(weights, sites, work, layer, thread, rows):  # type: ignore[no-untyped-def]
    """Compute the hidden values of a layer's experts at the rows where they speak."""
    places, factors = np.empty(rows, np.int64), np.empty(rows, np.float32)
    own = work.own[thread]
    for site in range(sites.first[layer], sites.first[layer + 1]):
        count = _speaking(work, site, work.tables[0], own, places, factors)
        if count:
            first, last = share(sites.inner[site])
            groups = (weights.sizes[1] + 63) // 64
            out = work.expert_rows[site]
            activate(sites.gate_up[site], first, last, own.ctypes.data, count, groups, sites.inner[site], out)


@njit(error_model="numpy")
def add_experts(sites, work, layer, thread, rows, first, last, zeros):  # type: ignore[no-untyped-def]
    """Add a layer's experts to panels `first` to `last - 1` of the stream."""
    places, factors = np.empty(rows, np.int64), np.empty(rows, np.float32)
    own = work.own[thread]
    for site in range(sites.first[layer], sites.first[layer + 1]):
        count = _speaking(work, site, work.tables[0], own, places, factors)
        if count:
            for i in range(count):
                own[i] = work.expert_rows[site] + i * row_bytes(sites.inner[site])
            add_projected(
                sites.down[site], first, last, own.ctypes.data, places[:count], factors[:count], sites.inner[site],
                zeros, work.stream,
            )  # fmt: skip
