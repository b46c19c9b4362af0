"""Native experts in the compiled step: the router (`model/moe/router.py`) and the networks of the
routed experts (`model/moe/experts.py`).

Each expert's weights are read once a step, whatever the number of rows that chose it.
"""

import numpy as np

from deepseek.compiled.products import activate, add_projected
from deepseek.compiled.rows import row_bytes
from deepseek.kernels.int8_layout import GROUP
from deepseek.kernels.numba.primitives import share, sigmoid, thread_count, thread_number
from deepseek.kernels.numba.subroutine import subroutine

ROUTER_BLOCK = 16  # experts whose logits a thread computes at a time
# Reading a panel of weights costs about as much as multiplying it by this many rows.
READING = 4


@subroutine(error_model="numpy")
def router_blocks(routed, layer):  # type: ignore[no-untyped-def]
    """Return the number of blocks of router logits at each row of a layer."""
    return (routed.experts + ROUTER_BLOCK - 1) // ROUTER_BLOCK if routed.sparse[layer] else 0


@subroutine(fastmath=True, error_model="numpy")
def _dot(weight, x):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for d in range(len(weight)):
        total += weight[d] * x[d]
    return total


@subroutine(error_model="numpy")
def score_experts(routed, work, layer, r, block, x):  # type: ignore[no-untyped-def]
    """Compute the router logits of one block of experts at row `r`, whose router input is `x`."""
    first = block * ROUTER_BLOCK
    for expert in range(first, min(first + ROUTER_BLOCK, routed.experts)):
        work.router_logits[r, expert] = _dot(routed.router[layer, expert], x)


@subroutine(error_model="numpy")
def route(routed, work, layer, rows):  # type: ignore[no-untyped-def]
    """Choose the experts of each row and their weights; the rows are divided among the threads."""
    first, last = share(rows)
    for r in range(first, last):
        logits = work.router_logits[r]
        if routed.dynamic:
            choose_dynamic(routed, layer, logits, work.routed_ids[r], work.routed_weights[r])
        else:
            choose_top(routed, layer, logits, work.routed_ids[r], work.routed_weights[r])


@subroutine(error_model="numpy")
def _best(keys, count, ids):  # type: ignore[no-untyped-def]
    """List the `count` largest keys in descending order, the first one of equal keys first.

    Keys that were listed become minus infinity.
    """
    for j in range(count):
        best = 0
        for e in range(len(keys)):
            if keys[e] > keys[best]:
                best = e
        ids[j] = best
        keys[best] = -np.inf


@subroutine(error_model="numpy")
def _softmax(x):  # type: ignore[no-untyped-def]
    """Replace numbers by their softmax."""
    largest = x[0]
    for j in range(len(x)):
        largest = max(largest, x[j])
    total = np.float32(0)
    for j in range(len(x)):
        x[j] = np.exp(x[j] - largest)
        total += x[j]
    for j in range(len(x)):
        x[j] /= total


@subroutine(error_model="numpy")
def _sort_descending(ids, logits):  # type: ignore[no-untyped-def]
    """Sort expert ids by their logits, keeping the order of equal ones."""
    for j in range(1, len(ids)):
        expert = ids[j]
        i = j
        while i > 0 and logits[ids[i - 1]] < logits[expert]:
            ids[i] = ids[i - 1]
            i -= 1
        ids[i] = expert


@subroutine(error_model="numpy")
def choose_dynamic(routed, layer, logits, ids, weights):  # type: ignore[no-untyped-def]
    """Choose a row's experts by the threshold rule, as `DynamicRouter.choose` does.

    Slots that are not used get the invalid id E and weight 0.
    """
    keys = np.empty(len(logits), np.float32)
    for e in range(len(logits)):
        keys[e] = sigmoid(logits[e]) + routed.bias[layer, e]
    candidates = np.empty(routed.candidates, np.int64)
    _best(keys, len(candidates), candidates)
    _sort_descending(candidates, logits)
    q = np.empty(len(candidates), np.float32)
    for j in range(len(candidates)):
        q[j] = logits[candidates[j]] / routed.temperature[layer]
    _softmax(q)
    active = 1  # the cumulative weight before the first expert is 0
    cumulative = np.float32(0)
    for j in range(len(candidates) - 1):
        cumulative += q[j]
        active += cumulative < routed.threshold[0]
    active = min(max(active, routed.min_experts), len(ids))
    for j in range(len(ids)):
        ids[j] = candidates[j] if j < active else routed.experts
        weights[j] = q[j] if j < active else np.float32(0)


@subroutine(error_model="numpy")
def _exclude_groups(keys, groups, max_groups):  # type: ignore[no-untyped-def]
    """Set the keys outside the best groups to minus infinity, as `TopKRouter` does."""
    size = len(keys) // groups
    strength = np.empty(groups, np.float32)
    best = np.empty(2, np.int64)
    for g in range(groups):
        group = keys[g * size : (g + 1) * size].copy()
        _best(group, min(2, size), best)
        strength[g] = keys[g * size + best[0]]
        if size > 1:
            strength[g] += keys[g * size + best[1]]
    allowed = np.empty(max_groups, np.int64)
    _best(strength, max_groups, allowed)
    # `_best` has set the strength of the allowed groups to minus infinity.
    for e in range(len(keys)):
        if strength[e // size] != -np.inf:
            keys[e] = -np.inf


@subroutine(error_model="numpy")
def choose_top(routed, layer, logits, ids, weights):  # type: ignore[no-untyped-def]
    """Choose a row's experts with the highest scores, as `TopKRouter.choose` does."""
    scores = logits.copy()
    if routed.sigmoid:
        for e in range(len(scores)):
            scores[e] = sigmoid(scores[e])
    else:
        _softmax(scores)
    keys = scores + routed.bias[layer]
    if routed.max_groups < routed.groups:
        _exclude_groups(keys, routed.groups, routed.max_groups)
    _best(keys, len(ids), ids)
    total = np.float32(1e-20)
    for j in range(len(ids)):
        weights[j] = scores[ids[j]]
        total += weights[j]
    for j in range(len(ids)):
        if routed.renormalize:
            weights[j] /= total
        weights[j] *= routed.scale[0]


@subroutine(error_model="numpy")
def rows_by_expert(routed, work, layer, rows):  # type: ignore[no-untyped-def]
    """Return the calls of a layer's experts, ordered by expert, then by row.

    Returns:
        The first call of each expert, then the number of calls `[E + 1]`; row and weight of each
        call.
    """
    slots = routed.slots if routed.sparse[layer] else 0
    first = np.zeros(routed.experts + 2, np.int64)
    for r in range(rows):
        for j in range(slots):
            first[work.routed_ids[r, j] + 1] += 1
    for e in range(routed.experts):
        first[e + 1] += first[e]
    calls = first[routed.experts]
    places = np.empty(calls, np.int64)
    factors = np.empty(calls, np.float32)
    free = first[: routed.experts + 1].copy()
    for r in range(rows):
        for j in range(slots):
            e = work.routed_ids[r, j]
            if e < routed.experts:
                places[free[e]] = r
                factors[free[e]] = work.routed_weights[r, j]
                free[e] += 1
    return first, places, factors


@subroutine(error_model="numpy")
def _ends_by(limit, before, cost, most):  # type: ignore[no-untyped-def]
    """Return how many of an expert's `most` groups, each at `cost`, start before `limit` if
    `before` was spent on other experts.
    """
    return min(max((limit - before + cost - 1) // cost, 0), most)


@subroutine(error_model="numpy")
def activate_routed(weights, routed, work, layer, calls):  # type: ignore[no-untyped-def]
    """Compute the hidden values of a layer's routed experts at the rows that chose them.

    The groups of hidden values of all experts are divided among the threads by their cost.
    """
    first, places, _ = calls
    groups = (weights.hidden + GROUP - 1) // GROUP
    inner = routed.inner
    table = np.empty(len(places), np.int64)
    for i in range(len(places)):
        table[i] = work.normed_rows[places[i]]
    total = 0
    for e in range(routed.experts):
        count = first[e + 1] - first[e]
        total += inner * (count + READING) if count else 0
    start = total * thread_number() // thread_count()
    stop = total * (thread_number() + 1) // thread_count()
    before = 0
    for e in range(routed.experts):
        count = first[e + 1] - first[e]
        if count == 0:
            continue
        cost = count + READING
        low = _ends_by(start, before, cost, inner)
        high = _ends_by(stop, before, cost, inner)
        rows = table[first[e] :].ctypes.data
        out = work.routed_rows[0] + first[e] * row_bytes(inner)
        activate(routed.gate_up[layer, e], low, high, rows, count, groups, inner, out, 0)
        before += inner * cost


@subroutine(error_model="numpy")
def add_routed(routed, work, layer, calls, start, stop, zeros, target):  # type: ignore[no-untyped-def]
    """Add the outputs of a layer's routed experts to panels `start` to `stop - 1` of `target`,
    in the order of the experts.
    """
    first, places, factors = calls
    inner = routed.inner
    table = work.routed_rows[0] + np.arange(len(places)) * row_bytes(inner)
    for e in range(routed.experts):
        if first[e] < first[e + 1]:
            add_projected(
                routed.down[layer, e],
                start,
                stop,
                table[first[e] :].ctypes.data,
                places[first[e] : first[e + 1]],
                factors[first[e] : first[e + 1]],
                inner,
                zeros,
                target,
            )
