"""Plugged experts in the compiled step: their gates (`model/experts/gate.py`) and feed-forward
networks.
"""

import numpy as np

from deepseek.compiled.abi import RECENT, SUMS
from deepseek.compiled.products import activate, add_projected
from deepseek.compiled.rows import floats, row_bytes
from deepseek.kernels.int8_layout import GROUP
from deepseek.kernels.numba.primitives import share
from deepseek.kernels.numba.subroutine import subroutine
from deepseek.model.experts.gate import SHARPNESS

COUNT = SUMS - 1  # index of the running sum of token weights, the denominator of the means


@subroutine(error_model="numpy")
def members_at(batch, sites, chunk, layer):  # type: ignore[no-untyped-def]
    """Return the range of a chunk's members at a layer: the first, and the one past the last."""
    start = batch.first_member[chunk]
    stop = batch.first_member[chunk + 1]
    while start < stop and batch.member_sites[start] < sites.first_site[layer]:
        start += 1
    end = start
    while end < stop and batch.member_sites[end] < sites.first_site[layer + 1]:
        end += 1
    return start, end


@subroutine(fastmath=True, error_model="numpy")
def _affine(gate, x):  # type: ignore[no-untyped-def]
    """Return the gate score: dot product with the gate's weights, plus its bias."""
    total = gate[len(gate) - 1]
    for d in range(len(gate) - 1):
        total += gate[d] * x[d]
    return total


@subroutine(error_model="numpy")
def score_row(batch, sites, work, layer, r, x):  # type: ignore[no-untyped-def]
    """Compute the gate scores of row `r`, whose gate input is `x`, for the experts of its
    sequence.
    """
    first_site = sites.first_site[layer]
    start, end = members_at(batch, sites, batch.chunk_of_row[r], layer)
    for member in range(start, end):
        site = batch.member_sites[member]
        for kind in range(2):
            work.gate_scores[r, site - first_site, kind] = _affine(
                sites.gates[batch.member_gates[member], kind], x
            )


@subroutine(error_model="numpy")
def weigh(batch, sites, work, layer):  # type: ignore[no-untyped-def]
    """Compute the weight of each expert at each row: running means of the gate scores, then
    arbitration.

    The chunks are divided among the threads.
    """
    first_site = sites.first_site[layer]
    first, last = share(len(batch.first_row) - 1)
    for chunk in range(first, last):
        start, end = members_at(batch, sites, chunk, layer)
        count = end - start
        if count == 0:
            continue
        place = start - batch.first_member[chunk]
        members = batch.first_member[chunk + 1] - batch.first_member[chunk]
        recent = floats(batch.gate_sums[chunk], RECENT, members, SUMS)
        detect = np.empty(count, np.float32)
        contrast = np.empty(count, np.float32)
        for r in range(batch.first_row[chunk], batch.first_row[chunk + 1]):
            position = batch.position_ids[r]
            before = recent[(position - 1) % RECENT, place:]
            sums = recent[position % RECENT, place:]
            for j in range(count):
                site = batch.member_sites[start + j]
                if batch.max_experts[chunk] == 0:  # forced experts have no gates
                    work.expert_weights[r, site] = 1
                    continue
                for kind in range(SUMS):
                    score = (
                        np.float32(1)
                        if kind == COUNT
                        else work.gate_scores[r, site - first_site, kind]
                    )
                    # The first token is left out: it is an attention sink, whose hidden state does
                    # not depend on the text.
                    sums[j, kind] = (
                        before[j, kind] * sites.decay[site] + score
                        if position > 0
                        else np.float32(0)
                    )
                detect[j] = sums[j, 0] / max(sums[j, COUNT], np.float32(1))
                contrast[j] = sums[j, 1] / max(sums[j, COUNT], np.float32(1))
            if batch.max_experts[chunk] and position > 0:
                sites_here = batch.member_sites[start:end]
                arbitrate(
                    sites_here, detect, contrast, batch.max_experts[chunk], work.expert_weights[r]
                )
                for j in range(count):
                    work.expert_weights[r, sites_here[j]] *= batch.member_factors[start + j]


@subroutine(error_model="numpy")
def arbitrate(members, detect, contrast, max_experts, weights):  # type: ignore[no-untyped-def]
    """Set `weights[members]` from smoothed gate scores, as `model.experts.gate.arbitrate` does.

    Members are ranked by their claims: the contrasting score plus the log sigmoid of the sharpened
    detecting score, or minus infinity if the expert does not fire. Ties go to the first member. The
    claims overwrite `contrast`.
    """
    claims = contrast
    count = len(members)
    for j in range(count):
        if detect[j] > 0:
            claims[j] -= np.float32(np.log1p(np.exp(-SHARPNESS * detect[j])))
        else:
            claims[j] = -np.inf
    # Softmax over the claims of the selected members, relative to the largest one for stability,
    # scaled down if the members' total strength is below 1.
    largest = np.float32(-np.inf)
    strength = np.float32(0)
    total = np.float32(0)
    for j in range(count):
        rank = 0
        for i in range(count):
            rank += claims[i] > claims[j] or (claims[i] == claims[j] and i < j)
        weights[members[j]] = 1 if detect[j] > 0 and rank < max_experts else 0
        if weights[members[j]] > 0:
            largest = max(largest, claims[j])
            strength += np.float32(1 / (1 + np.exp(-SHARPNESS * detect[j])))
    for j in range(count):
        share_j = (
            np.float32(np.exp(claims[j] - largest)) if weights[members[j]] > 0 else np.float32(0)
        )
        weights[members[j]] *= share_j
        total += weights[members[j]]
    for j in range(count):
        if weights[members[j]] > 0:
            weights[members[j]] *= min(np.float32(1), strength) / total


@subroutine(error_model="numpy")
def _select_rows(work, site, selected, places, factors):  # type: ignore[no-untyped-def]
    """List the rows at which a site has a positive weight; return their number.

    Fills `selected` with the addresses of the rows' inputs, `places` with the row numbers and
    `factors` with the weights.
    """
    count = 0
    for r in range(len(places)):
        if work.expert_weights[r, site] > 0:
            selected[count] = work.normed_rows[r]
            places[count] = r
            factors[count] = work.expert_weights[r, site]
            count += 1
    return count


@subroutine(error_model="numpy")
def activate_experts(weights, sites, work, layer, thread, rows):  # type: ignore[no-untyped-def]
    """Compute the hidden values of a layer's experts at the rows where they fire."""
    groups = (weights.hidden + GROUP - 1) // GROUP
    places = np.empty(rows, np.int64)
    factors = np.empty(rows, np.float32)
    selected = work.selected_rows[thread]
    for site in range(sites.first_site[layer], sites.first_site[layer + 1]):
        count = _select_rows(work, site, selected, places, factors)
        if count:
            inner = sites.inner[site]
            first, last = share(inner)
            table = selected.ctypes.data
            activate(
                sites.gate_up[site],
                first,
                last,
                table,
                count,
                groups,
                inner,
                work.expert_rows[site],
                0,
            )


@subroutine(error_model="numpy")
def add_experts(sites, work, layer, thread, rows, first, last, zeros, target):  # type: ignore[no-untyped-def]
    """Add the outputs of a layer's experts to panels `first` to `last - 1` of `target`."""
    places = np.empty(rows, np.int64)
    factors = np.empty(rows, np.float32)
    selected = work.selected_rows[thread]
    for site in range(sites.first_site[layer], sites.first_site[layer + 1]):
        count = _select_rows(work, site, selected, places, factors)
        if count:
            inner = sites.inner[site]
            for i in range(count):
                selected[i] = work.expert_rows[site] + i * row_bytes(inner)
            table = selected.ctypes.data
            rows_here = places[:count]
            add_projected(
                sites.down[site],
                first,
                last,
                table,
                rows_here,
                factors[:count],
                inner,
                zeros,
                target,
            )
