"""What the compiled step reads and writes: one table for each group of buffers, with name, dtype
and shape.

To add a buffer, add a row here and its value where the group's values are put together:
`PackedModel` for `WEIGHTS`, `Sites` for `SITES`, `Scratch` for `BATCH`; what the step itself fills
(`WORK`) needs no value.

Addresses are of memory that has no array of its own for the kernel: packed panels of weights
(`kernels/int8.py`), pages of keys and values (`compiled/state.py`), and quantised rows of
activations (`compiled/rows.py`).
"""

from deepseek.kernels.numba.buffers import BF16, FP32, INT64, Buffer, Table

PAGE = 64  # tokens whose keys and values lie together
RECENT = 8  # positions whose running sums of gate scores are kept, so that a step's last tokens can be taken back
SUMS = 3  # running sums of a gate: detecting scores, contrasting scores, and their weights
BLOCK = 64  # rows that a panel of weights is multiplied by before their results are used
QUERIES = 6  # most queries of a unit of attention: with four vectors each they fill the registers
SYNC_STRIDE = (
    8  # counters lie a cache line apart, so that threads at one do not disturb those at another
)

WEIGHTS = Table(
    "Weights",
    (
        Buffer("layers", INT64, "", "number of layers"),
        Buffer("hidden", INT64, "", "width D of the residual stream"),
        Buffer("heads", INT64, "", "query heads H"),
        Buffer("groups", INT64, "", "key/value heads G"),
        Buffer("width", INT64, "", "width K of a head"),
        Buffer("inner", INT64, "", "groups of 64 hidden values of a feed-forward network"),
        Buffer("vocabulary", INT64, "", "outputs V of the head"),
        Buffer("qkv", INT64, "layers", "addresses of the query, key and value projections"),
        Buffer("out", INT64, "layers", "addresses of the output projections"),
        Buffer("gate_up", INT64, "layers", "addresses of the gate and up projections"),
        Buffer("down", INT64, "layers", "addresses of the down projections"),
        Buffer("lm_head", INT64, "", "address of the head"),
        Buffer("embed_tokens", INT64, "", "address of the embedding"),
        Buffer(
            "norms", FP32, "norms hidden", "scales of each layer's two norms, and of the last one"
        ),
        Buffer(
            "head_norms",
            FP32,
            "layers 2 head_norm_width",
            "scales of the norms of queries and of keys, if any",
        ),
        Buffer("qkv_bias", FP32, "layers qkv_width", "zeros where the projections have none"),
        Buffer("out_bias", FP32, "layers hidden", "zeros where the projection has none"),
        Buffer("windows", INT64, "layers", "tokens that a query sees; 0: all before it"),
        Buffer("cosine", FP32, "positions half_width", "rotary angles of each position"),
        Buffer("sine", FP32, "positions half_width", "rotary angles of each position"),
        Buffer("eps", FP32, "1", "what norms add to the mean square"),
    ),
)

BATCH = Table(
    "Batch",
    (
        Buffer("input_ids", INT64, "rows", "new tokens of all chunks"),
        Buffer("position_ids", INT64, "rows", "their positions"),
        Buffer("chunk_of_row", INT64, "rows", "the chunk that each belongs to"),
        Buffer(
            "first_row",
            INT64,
            "chunks+1",
            "row of each chunk's first token, and the number of rows",
        ),
        Buffer(
            "pages", INT64, "chunks pages", "addresses of each chunk's pages, filled up with zeros"
        ),
        Buffer(
            "first_unit",
            INT64,
            "chunks+1",
            "first unit of attention of each chunk, and the number of units",
        ),
        Buffer(
            "unit_queries",
            INT64,
            "",
            "queries, of one group of heads, that are a unit of attention",
        ),
        Buffer("kept_rows", INT64, "kept", "rows that need logits"),
        Buffer(
            "first_member",
            INT64,
            "chunks+1",
            "first of each chunk's members, and the number of members",
        ),
        Buffer(
            "member_sites",
            INT64,
            "members",
            "site of each member of the chunks' sets of experts, by layers",
        ),
        Buffer(
            "member_gates",
            INT64,
            "members",
            "row of `Sites.gates`, which depends on the other members too",
        ),
        Buffer(
            "gate_sums",
            INT64,
            "chunks",
            "addresses of running sums `[RECENT, members, SUMS]`, position % RECENT",
        ),
        Buffer(
            "max_experts",
            INT64,
            "chunks",
            "most experts at one token; 0: all of them, with weight 1",
        ),
        Buffer("logits", FP32, "kept vocabulary", "what the step computes"),
    ),
)

SITES = Table(
    "Sites",
    (
        Buffer(
            "first_site",
            INT64,
            "layers+1",
            "first site of each layer; a site is an expert at a layer",
        ),
        Buffer("gate_up", INT64, "sites", "addresses of the gate and up projections"),
        Buffer("down", INT64, "sites", "addresses of the down projections"),
        Buffer("inner", INT64, "sites", "groups of 64 hidden values"),
        Buffer(
            "gates",
            FP32,
            "gates 2 hidden+1",
            "detecting and contrasting row of each member of each set",
        ),
        Buffer("decay", FP32, "sites", "what a running sum keeps per token"),
    ),
)

WORK = Table(
    "Work",
    (
        Buffer("residual", FP32, "capacity hidden", "the residual stream"),
        Buffer(
            "projected", FP32, "capacity qkv_width", "queries, keys and values before positions"
        ),
        Buffer(
            "queries",
            BF16,
            "groups capacity group_heads width",
            "rotated queries, by group of heads",
        ),
        Buffer(
            "normed_rows",
            INT64,
            "capacity",
            "addresses of the quantised inputs of a layer, or of the head",
        ),
        Buffer(
            "attended_rows", INT64, "capacity", "addresses of the quantised outputs of the heads"
        ),
        Buffer("inner_rows", INT64, "capacity", "addresses of the quantised hidden values"),
        Buffer(
            "gate_scores",
            FP32,
            "capacity layer_sites 2",
            "detecting and contrasting score of a layer's sites",
        ),
        Buffer("expert_weights", FP32, "capacity sites", "how much each expert adds at each row"),
        Buffer(
            "expert_rows",
            INT64,
            "sites",
            "address of the first quantised row of each site's hidden values",
        ),
        Buffer("attention_scores", FP32, "threads queries span", "of a unit's queries"),
        Buffer("attention_probs", BF16, "threads queries span", "the same, after softmax"),
        Buffer(
            "selected_rows",
            INT64,
            "threads capacity",
            "addresses of the rows at which an expert speaks",
        ),
        Buffer(
            "sync",
            INT64,
            "counters",
            "the barrier's counters, then each layer's next unit of attention",
        ),
    ),
)

TABLES = (WEIGHTS, BATCH, SITES, WORK)
