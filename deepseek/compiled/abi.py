"""ABI of the compiled step: one table for each group of buffers that it reads or writes, with name,
dtype and shape.

To add a buffer, add a row here and supply its value where the group's values are assembled: in
`PackedModel` for `WEIGHTS`, in `Sites` for `SITES`, in `NativeExperts` for `ROUTED`, in `Scratch`
and `BatchLayers` for `BATCH`. Buffers that the step itself fills (`WORK`) need no value.

Memory without an array of its own is passed by address: packed panels of weights
(`kernels/int8.py`), to whose address `FOUR_BITS` and `BY_TILES` are added, pages of keys and values
(`compiled/page_shape.py`), and quantised rows of activations (`compiled/rows.py`).
"""

from deepseek.kernels.bias.distance import NUM_BUCKETS
from deepseek.kernels.numba.buffers import BF16, FP32, INT64, Buffer, Table

# Added to the address of panels: if their weights have 4 bits; if AMX tiles may multiply them.
# Panels themselves lie at multiples of 64.
FOUR_BITS = 1
BY_TILES = 2
PAGE = 64  # tokens in a page of keys and values
# Number of latest positions with running sums of gate scores; a state can rewind by RECENT - 1.
RECENT = 8
SUMS = 3  # running sums of a gate: detecting scores, contrasting scores, and the token weights
BLOCK = 64  # rows that a panel of weights is multiplied by before the results are used
TILE_BLOCK = 256  # the same for products by tiles, which start slowly after a pause
# Minimum number of rows for tiles. A panel is unpacked ("opened") for them first, which costs as
# much as about 16 rows.
FEWEST_TILE_ROWS = 48
# Maximum number of queries in a unit of attention: those of a tile, or as many as fill the
# registers with four vectors each.
QUERIES = 16
VECTOR_QUERIES = 6
# Numbers of LSH attention: keys of the local window, sinks, keys of a bucket, whether there is a
# far field, rounds of hashing, buckets probed in each, buckets (rounded up to a multiple of 64),
# and maps that score the buckets of queries and of keys: one for each head, or one for all.
LOCAL, SINKS, WINDOW, FAR_FIELD, ROUNDS, PROBES, BUCKETS, QUERY_MAPS, KEY_MAPS = range(9)
LSH_NUMBERS = 9
SYNC_STRIDE = 8  # int64s between counters: a cache line, against false sharing

WEIGHTS = Table(
    "Weights",
    (
        Buffer("layers", INT64, "", "number of layers"),
        Buffer("hidden", INT64, "", "width D of the residual stream"),
        Buffer("heads", INT64, "", "query heads H"),
        Buffer("groups", INT64, "", "key/value heads G"),
        Buffer("width", INT64, "", "width K of a head"),
        Buffer("page_width", INT64, "", "K rounded up to a multiple of 64, as pages hold it"),
        Buffer(
            "inner",
            INT64,
            "layers",
            "groups of 64 hidden values of a dense network or of the shared experts; 0: none",
        ),
        Buffer("vocabulary", INT64, "", "outputs V of the head"),
        Buffer("qkv", INT64, "layers", "addresses of the query, key and value projections"),
        Buffer("out", INT64, "layers", "addresses of the output projections"),
        Buffer("gate_up", INT64, "layers", "addresses of the gate and up projections"),
        Buffer("down", INT64, "layers", "addresses of the down projections"),
        Buffer("lm_head", INT64, "", "address of the head"),
        Buffer("embed_tokens", INT64, "", "address of the embedding"),
        Buffer(
            "norms", FP32, "norms hidden", "scales of each layer's two norms, and of the final one"
        ),
        Buffer(
            "post_norms",
            FP32,
            "post_norms hidden",
            "scales of each layer's two norms of outputs, if any",
        ),
        Buffer(
            "head_norms",
            FP32,
            "layers 2 head_norm_width",
            "scales of the norms of queries and of keys, over a head or the full width, if any",
        ),
        Buffer("qkv_bias", FP32, "layers qkv_width", "zeros where the projections have none"),
        Buffer("out_bias", FP32, "layers hidden", "zeros where the projection has none"),
        Buffer("joint_norm", INT64, "", "1: those norms are over all heads together; 0: over each"),
        Buffer("clip", FP32, "1", "largest absolute query, key and value; 0: no clamp"),
        Buffer("score_cap", FP32, "1", "cap c of scores z, c tanh(z / c); 0: no cap"),
        Buffer("logit_cap", FP32, "1", "cap of logits; 0: no cap"),
        Buffer("windows", INT64, "layers", "sliding window in tokens; 0: full causal attention"),
        Buffer("rotation", INT64, "layers", "which rotary angles a layer has"),
        Buffer("cosine", FP32, "rotations positions half_width", "rotary angles of positions"),
        Buffer("sine", FP32, "rotations positions half_width", "rotary angles of positions"),
        Buffer("query_scale", FP32, "1", "factor on all attention scores"),
        Buffer("embed_scale", FP32, "1", "factor on embeddings"),
        Buffer("activation", INT64, "", "of the feed-forward networks: 0 for SiLU, 1 for GELU"),
        Buffer("slopes", FP32, "alibi_heads", "slope of each head's linear bias, if any"),
        Buffer(
            "signals",
            INT64,
            "layers",
            "addresses of the dynamic bias's projections to contexts and forget gates; 0: none",
        ),
        Buffer("signal_bias", FP32, "layers signals", "biases of these projections"),
        Buffer(
            "bias_tables",
            FP32,
            f"layers bias_heads contexts+1 {NUM_BUCKETS}",
            "bias by distance, then the shift of it by each context",
        ),
        Buffer("decay", FP32, "layers bias_heads", "factor on the forget gates"),
        Buffer("length_scale", FP32, "layers bias_heads", "growth of queries with `growth`"),
        Buffer("growth", FP32, "positions", "logarithm of the position in training lengths"),
        Buffer("hashes", INT64, "layers", "addresses of the hashes of LSH attention; 0: exact"),
        Buffer("lsh", INT64, f"{LSH_NUMBERS}", "numbers of LSH attention, such as `LOCAL`"),
        Buffer("tiles", INT64, "", "1: AMX tiles are available"),
        Buffer("tile_attention", INT64, "", "1: attention uses them"),
        Buffer("eps", FP32, "1", "epsilon that the norms add to the mean square"),
    ),
)

BATCH = Table(
    "Batch",
    (
        Buffer("input_ids", INT64, "rows", "new tokens of all chunks"),
        Buffer("position_ids", INT64, "rows", "positions of the new tokens"),
        Buffer("chunk_of_row", INT64, "rows", "chunk of each row"),
        Buffer(
            "first_row",
            INT64,
            "chunks+1",
            "row of each chunk's first token, then the number of rows",
        ),
        Buffer(
            "pages",
            INT64,
            "parts chunks pages",
            "addresses of each chunk's pages (see `PageShape.address`), padded with zeros",
        ),
        Buffer("layer_bytes", INT64, "", "bytes of a layer in a page"),
        Buffer("codes_start", INT64, "", "where in a layer of a page the buckets of keys start"),
        Buffer("sums_start", INT64, "", "where the sums of the far field start"),
        Buffer("part_of_layer", INT64, "layers", "part of the layers that `pages` has them in"),
        Buffer("entry", INT64, "", "layer after whose attention the rows enter; -1: at layer 0"),
        Buffer("entering", FP32, "entering hidden", "the residual stream of rows that enter there"),
        Buffer("cut_of_layer", INT64, "layers", "index of the layer among the cuts; -1: no cut"),
        Buffer("streams", FP32, "cuts rows hidden", "result: the residual stream at each cut"),
        Buffer(
            "first_unit",
            INT64,
            "chunks+1",
            "first unit of attention of each chunk, then the number of units",
        ),
        Buffer("unit_queries", INT64, "", "queries of one group of heads in a unit of attention"),
        Buffer("kept_rows", INT64, "kept", "rows whose logits are needed"),
        Buffer(
            "first_member",
            INT64,
            "chunks+1",
            "first member of each chunk, then the number of members",
        ),
        Buffer(
            "member_sites",
            INT64,
            "members",
            "site of each member of the chunks' rosters, ordered by layer",
        ),
        Buffer(
            "member_gates", INT64, "members", "row of `Sites.gates`; it depends on the whole roster"
        ),
        Buffer(
            "member_factors",
            FP32,
            "members",
            "factor of the request on the weight of each member; 1: as trained",
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
            "maximum number of experts at one token; 0: all of them, with weight 1",
        ),
        Buffer("logits", FP32, "kept vocabulary", "result of the step"),
    ),
)

ROUTED = Table(
    "Routed",
    (
        Buffer("experts", INT64, "", "routed experts E of a pool; 0: a dense model"),
        Buffer("slots", INT64, "", "maximum number of experts at one token"),
        Buffer("inner", INT64, "", "groups of 64 hidden values of a routed expert"),
        Buffer("dynamic", INT64, "", "1: as many experts as the threshold needs; 0: top-k"),
        Buffer("candidates", INT64, "", "experts that the softmax of dynamic routing runs over"),
        Buffer("min_experts", INT64, "", "minimum number of experts of dynamic routing"),
        Buffer("threshold", FP32, "1", "cumulative weight at which dynamic routing stops"),
        Buffer("sigmoid", INT64, "", "scores of top-k: 1: sigmoid; 0: softmax"),
        Buffer("renormalize", INT64, "", "1: the weights of a token are divided by their sum"),
        Buffer("scale", FP32, "1", "factor on the weights of top-k"),
        Buffer("groups", INT64, "", "groups of experts of group-limited top-k"),
        Buffer("max_groups", INT64, "", "groups whose experts are eligible"),
        Buffer("sparse", INT64, "layers", "1: the layer has routed experts"),
        Buffer("router", FP32, "layers experts hidden", "weights of the routers"),
        Buffer("bias", FP32, "layers experts", "balance bias, for the choice alone"),
        Buffer("temperature", FP32, "layers", "divisor of the logits in dynamic routing"),
        Buffer("gate_up", INT64, "layers experts", "addresses of the gate and up projections"),
        Buffer("down", INT64, "layers experts", "addresses of the down projections"),
    ),
)

SITES = Table(
    "Sites",
    (
        Buffer(
            "first_site",
            INT64,
            "layers+1",
            "first site of each layer, where a site is an expert at a layer",
        ),
        Buffer("gate_up", INT64, "sites", "addresses of the gate and up projections"),
        Buffer("down", INT64, "sites", "addresses of the down projections"),
        Buffer("inner", INT64, "sites", "groups of 64 hidden values"),
        Buffer(
            "gates",
            FP32,
            "gates 2 hidden+1",
            "detecting and contrasting row of each member of each roster",
        ),
        Buffer("decay", FP32, "sites", "decay of the running sums per token"),
    ),
)

WORK = Table(
    "Work",
    (
        Buffer("residual", FP32, "capacity hidden", "the residual stream"),
        Buffer(
            "update", FP32, "capacity update_width", "outputs that are normed before they are added"
        ),
        Buffer("projected", FP32, "capacity qkv_width", "queries, keys and values before rotation"),
        Buffer(
            "queries",
            BF16,
            "groups capacity group_heads width",
            "rotated queries, by group of heads",
        ),
        Buffer(
            "query_codes",
            INT64,
            "capacity hashed_heads codes",
            "buckets that each query probes, round after round",
        ),
        Buffer("signals", FP32, "capacity signals", "contexts and forget gates of each row"),
        Buffer(
            "distance_bias",
            FP32,
            f"capacity bias_heads {NUM_BUCKETS}",
            "bias of each row's scores by distance",
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
        Buffer(
            "attended",
            FP32,
            "capacity attended_width",
            "outputs of the heads, if their width is no multiple of 64",
        ),
        Buffer(
            "inner_rows",
            INT64,
            "1",
            "address of the first quantised row of a dense network's hidden values",
        ),
        Buffer(
            "gate_scores",
            FP32,
            "capacity layer_sites 2",
            "detecting and contrasting gate scores of a layer's sites",
        ),
        Buffer("expert_weights", FP32, "capacity sites", "weight of each expert at each row"),
        Buffer(
            "expert_rows",
            INT64,
            "sites",
            "address of the first quantised row of each site's hidden values",
        ),
        Buffer("router_logits", FP32, "capacity experts", "router logits of a layer"),
        Buffer(
            "routed_ids",
            INT64,
            "capacity slots",
            "native experts of each row at a layer; E in unused slots",
        ),
        Buffer("routed_weights", FP32, "capacity slots", "their weights"),
        Buffer(
            "routed_rows",
            INT64,
            "1",
            "address of the quantised hidden values of the native experts, one row for each call",
        ),
        # Numba counts references to an array that a kernel allocates at every slice of it, but not
        # to these.
        Buffer("head", FP32, "threads page_width", "a query, key or value before positions"),
        Buffer("head_bits", BF16, "threads page_width", "the same after them"),
        Buffer("attended_unit", FP32, "threads queries page_width", "sums of a unit's values"),
        Buffer("attention_scores", FP32, "threads queries span", "scores of a unit's queries"),
        Buffer("attention_probs", BF16, "threads queries span", "the scores after softmax"),
        Buffer(
            "selected_rows",
            INT64,
            "threads capacity",
            "addresses of the rows of a network: those at which an expert fires, or all",
        ),
        Buffer(
            "sync",
            INT64,
            "counters",
            "the barrier's counters, then the next unit of attention of each layer",
        ),
    ),
)

TABLES = (WEIGHTS, BATCH, SITES, ROUTED, WORK)
