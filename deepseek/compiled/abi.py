"""What the compiled step reads and writes, as the kernel sees it: named tuples of arrays, some of them of addresses."""

from collections import namedtuple

PAGE = 64  # tokens whose keys and values lie together
RECENT = 8  # positions whose running sums of gates are kept, so that a step's last tokens can be taken back
BLOCK = 64  # rows that a panel of weights is multiplied by before their results are used

Weights = namedtuple(
    "Weights", "sizes qkv out gate_up down head embedding norms head_norms qkv_bias out_bias windows cosine sine eps"
)
"""A model. Addresses are of packed panels (see `kernels/int8.py`).

sizes: layers, hidden size, heads, groups of heads, head width, groups of 64 hidden values, outputs of the head.
qkv, out, gate_up, down: address of each layer's matrices `[L]`. head, embedding: addresses `[1]`.
norms: `[2 L + 1, D]`. head_norms: of queries and keys `[L, 2, K or 0]`. qkv_bias, out_bias: `[L, ...]`.
windows: visible tokens of each layer `[L]`. cosine, sine: `[positions, K / 2]`. eps: `[1]`.
"""

Batch = namedtuple(
    "Batch", "ids positions chunk first pages units block kept member_first members gates sums most logits"
)
"""New tokens of C chunks, N rows in all.

ids, positions, chunk: `[N]`. first: row of each chunk's first token `[C + 1]`. pages: their addresses `[C, pages]`.
units: first unit of attention of each chunk `[C + 1]`; a unit is `block` queries of one group of heads.
kept: rows that need logits `[R]`. members: sites of each chunk, from `member_first` `[C + 1]` on, in canonical order;
gates: their rows of `Sites.gates`, which also depend on the other members.
sums: address of each chunk's running sums `[RECENT, members, 3]`, after position p at p % RECENT. most: of modules at
one token, 0 where all are forced on `[C]`. logits: what the step finds, `[R, V]`.
"""

Sites = namedtuple("Sites", "first gate_up down inner gates decay")
"""Places of experts: a module at a layer, in the order of layers.

first: first site of each layer `[L + 1]`. gate_up, down: addresses, and inner: groups of 64 hidden values `[S]`.
gates: two rows for each member of each set of experts `[members, 2, D + 1]`. decay: `[S]`.
"""

Work = namedtuple("Work", "stream projected queries tables scores said expert_rows weighed shares own sync")
"""Memory of a step, for N rows or more.

stream: `[N, D]`. projected: queries, keys and values `[N, ...]`. queries: bf16 `[G, N, H/G, K]`. tables: addresses
`[3, N]` of the rounded rows that are input of layers, heads' outputs, hidden values; and of kept rows in the first.
scores: gate scores `[N, sites of a layer, 2]`. said: experts' weights `[N, S]`. expert_rows: address of each
site's rounded hidden values `[S]`.
weighed: fp32 attention scores `[threads, rows, S]`, and the same as bf16. own: addresses `[threads, N]`.
sync: counter of the barrier, then the next unit of attention of each layer `[8 (L + 1)]`.
"""

KINDS = (
    "l1 l1 l1 l1 l1 l1 l1 f2 f3 f2 f2 l1 f2 f2 f1 "  # Weights
    "l1 l1 l1 l1 l2 l1 l1 l1 l1 l1 l1 l1 l1 f2 "  # Batch
    "l1 l1 l1 l1 f3 f1 "  # Sites
    "f2 f2 b4 l2 f3 f2 l1 f3 b3 l2 l1"  # Work
)
"""Of all their arrays, as `kernels/numba/launch.py` names them."""
