"""What the compiled step reads and writes, as the kernel sees it: named tuples of arrays and addresses."""

from typing import Any, NamedTuple

PAGE = 64  # tokens whose keys and values lie together
RECENT = 8  # positions whose running sums of gates are kept, so that a step's last tokens can be taken back
BLOCK = 64  # rows that a panel of weights is multiplied by before their results are used


class Weights(NamedTuple):
    """A model. Addresses are of packed panels (see `kernels/int8.py`).

    sizes: layers, hidden size, heads, groups of heads, head width, groups of 64 hidden values, outputs of the head,
        width of the norms of heads (0 without).
    qkv, out, gate_up, down: address of each layer's matrices `[L]`. head, embedding: addresses `[1]`.
    norms: `[2 L + 1, D]`. head_norms: of queries and keys `[L, 2, K or 0]`. qkv_bias, out_bias: `[L, ...]`.
    windows: visible tokens of each layer `[L]`. cosine, sine: `[positions, K / 2]`. eps: `[1]`.
    """

    sizes: Any
    qkv: Any
    out: Any
    gate_up: Any
    down: Any
    head: Any
    embedding: Any
    norms: Any
    head_norms: Any
    qkv_bias: Any
    out_bias: Any
    windows: Any
    cosine: Any
    sine: Any
    eps: Any


class Batch(NamedTuple):
    """New tokens of C chunks, N rows in all.

    ids, positions, chunk: `[N]`. first: row of each chunk's first token `[C + 1]`. pages: their addresses `[C, pages]`.
    units: first unit of attention of each chunk `[C + 1]`; a unit is `block` queries of one group of heads.
    kept: rows that need logits `[R]`.
    """

    ids: Any
    positions: Any
    chunk: Any
    first: Any
    pages: Any
    units: Any
    block: Any
    kept: Any


class Sites(NamedTuple):
    """Places of experts: a module at a layer, in the order of layers.

    first: first site of each layer `[L + 1]`. gate_up, down: addresses, and inner: groups of 64 hidden values `[S]`.
    gates: `[S, 2, D + 1]`, decay: `[S]`. members: sites of each chunk, from `member_first` `[C + 1]` on, in canonical
    order. sums: address of each chunk's running sums `[RECENT, members, 3]`, after position p at p % RECENT. most:
    of modules at one token, 0 where all are forced on `[C]`.
    """

    first: Any
    gate_up: Any
    down: Any
    inner: Any
    gates: Any
    decay: Any
    member_first: Any
    members: Any
    sums: Any
    most: Any


class Work(NamedTuple):
    """Memory of a step.

    stream: `[N, D]`. projected: queries, keys and values `[N, ...]`. queries: bf16 `[G, N, H/G, K]`. tables: addresses
    `[4, N]` of the rounded rows that are input of layers, heads' outputs, hidden values, and of kept rows.
    scores: gate scores `[N, sites of a layer, 2]`. said: experts' weights `[N, S]`. expert_rows: address of each
    site's rounded hidden values `[S]`. logits: `[R, V]`.
    weighed: fp32 attention scores `[threads, rows, S]`, and the same as bf16. own: addresses `[threads, N]`.
    sync: counter of the barrier, then the next unit of attention of each layer `[L + 1]`.
    """

    stream: Any
    projected: Any
    queries: Any
    tables: Any
    scores: Any
    said: Any
    expert_rows: Any
    logits: Any
    weighed: Any
    shares: Any
    own: Any
    sync: Any
