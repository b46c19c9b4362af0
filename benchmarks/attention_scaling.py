"""Time and memory of LSH attention and of its rivals by number of tokens.

    python benchmarks/attention_scaling.py [--tokens 4096 8192 16384 32768 65536] [--turns 3]
        [--dtype bfloat16]

All take turns on the same tensors (9 query heads, 3 key heads, width 64, fp32 or `--dtype`), so
that other work on the machine slows all of them alike. Our times include hashing. Peak memory is
measured in a fresh process and includes inputs, outputs and gradients. Writes
`results/attention_scaling.json` (or `--json`) and a plot beside it.

`wide` is ours with the probes, windows and far field with which SmolLM2's loss stays within 1 % of
exact attention's (`benchmarks/lsh_slot_in.py`); `ours` has the defaults, a fifth of the keys.

Rivals: `sdpa`, torch's exact attention; `materialised`, exact attention that stores all scores, up
to 8,192 tokens; `blocks`, each query's own block of 128 keys and the 3 earlier blocks whose mean
key scores highest (MoBA, arXiv:2502.13189); `reformer`, the LSH attention of `transformers` with
one hash and without its projections (it shares queries and keys and has as many key heads as query
heads).
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from entry import run_main
from results import add_output, write
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import ReformerConfig
from transformers.models.reformer.modeling_reformer import LSHSelfAttention

from deepseek.kernels.lsh.decode import BucketCache
from deepseek.kernels.lsh.intervals import Windows
from deepseek.model.attention.lsh import RandomHash
from deepseek.model.attention.sparse import sparse_attention

HEADS, GROUPS, WIDTH = 9, 3, 64
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOKENS = [2048, 4096, 8192, 16384, 32768, 65536]
TABLES = ("forward", "training", "peak", "decode")
# Maximum number of tokens: more take gigabytes or minutes.
MOST = {"materialised": 8192, "blocks": 16384, "sdpa": 32768}
DECODE = Windows(local=128, sinks=4, bucket=96, num_buckets=64)

Way = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def materialised(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    share, length = HEADS // GROUPS, query.shape[2]
    scores = query @ key.repeat_interleave(share, 1).mT * WIDTH**-0.5
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -inf).softmax(-1) @ value.repeat_interleave(share, 1)


def blocks(query: Tensor, key: Tensor, value: Tensor, size: int = 128, chosen: int = 3) -> Tensor:
    """Block top-k: one dense product per block for the queries that chose it, merged by
    log-sum-exp.
    """
    outs = []
    for head in range(HEADS):
        q, k, v = query[0, head], key[0, head * GROUPS // HEADS], value[0, head * GROUPS // HEADS]
        own = torch.arange(len(q)) // size
        with torch.no_grad():
            likeness = q @ k.unflatten(0, (-1, size)).mean(1).T
            likeness.masked_fill_(torch.arange(likeness.shape[1]) >= own[:, None], -inf)
            best = likeness.topk(min(chosen, likeness.shape[1]))
            picked = best.indices.masked_fill(best.values == -inf, -1)
        rows, parts, sums = [], [], []
        for block in range(len(q) // size):
            keys, first = slice(block * size, (block + 1) * size), block * size
            chose = torch.cat(
                (torch.arange(first, first + size), (picked == block).any(-1).nonzero()[:, 0])
            )
            scores = q[chose] @ k[keys].T * WIDTH**-0.5
            scores = scores.masked_fill(torch.arange(first, first + size) > chose[:, None], -inf)
            lse = scores.logsumexp(-1)
            rows.append(chose)
            sums.append(lse)
            parts.append((scores - lse[:, None]).exp() @ v[keys])
        row, lse = torch.cat(rows), torch.cat(sums)
        highest = torch.full((len(q),), -inf).scatter_reduce(0, row, lse.detach(), "amax")
        weight = (lse - highest[row]).exp()
        total = torch.zeros(len(q)).index_add(0, row, weight)
        outs.append(
            torch.zeros(len(q), WIDTH).index_add(0, row, torch.cat(parts) * weight[:, None])
            / total[:, None]
        )
    return torch.stack(outs)[None]


class Half(nn.Module):
    """Replaces a projection; returns one half of the features."""

    def __init__(self, half: int) -> None:
        super().__init__()
        self.half = half

    def forward(self, x: Tensor) -> Tensor:
        return x.chunk(2, -1)[self.half]


def reformer() -> Way:
    width = HEADS * WIDTH
    config = ReformerConfig(
        attention_head_size=WIDTH,
        num_attention_heads=HEADS,
        hidden_size=width,
        num_hashes=1,
        is_decoder=True,
        lsh_attn_chunk_length=64,
        lsh_attention_probs_dropout_prob=0.0,
        max_position_embeddings=1 << 17,
        hash_seed=0,
    )
    layer = LSHSelfAttention(config)
    layer.query_key, layer.value = Half(0), Half(1)

    def way(query: Tensor, _key: Tensor, value: Tensor) -> Tensor:
        values = value.repeat_interleave(HEADS // GROUPS, 1)
        layer.num_buckets = None  # chosen anew for each length, as the layer recommends
        both = torch.cat([part.transpose(1, 2).flatten(2) for part in (query, values)], -1)
        return layer(both).hidden_states

    return way


WAYS: dict[str, Way] = {
    "ours": sparse_attention,
    "wide": partial(
        sparse_attention,
        num_buckets=64,
        probes=28,
        bucket_window=96,
        local_window=128,
        far_field=True,
    ),
    "sdpa": sdpa,
    "reformer": reformer(),
    "blocks": blocks,
    "materialised": materialised,
}


def inputs(tokens: int, learn: bool, dtype: str) -> list[Tensor]:
    """Random queries, keys and values, laid out as a model's projections produce them."""
    torch.manual_seed(0)
    parts = [
        torch.randn(1, tokens, heads, WIDTH).to(DTYPES[dtype]).transpose(1, 2)
        for heads in (HEADS, GROUPS, GROUPS)
    ]
    return [part.requires_grad_(learn) for part in parts]


def run(way: Way, parts: list[Tensor], learn: bool) -> None:
    if learn:
        out = way(*parts)
        out.backward(torch.ones_like(out))
        for part in parts:
            part.grad = None
    else:
        with torch.no_grad():
            way(*parts)


def fits(name: str, tokens: int) -> bool:
    return tokens <= MOST.get(name, 1 << 20)


def times(tokens: int, learn: bool, turns: int, dtype: str) -> dict[str, float]:
    """Median seconds of each implementation, all taking turns; those that take more than 15 seconds
    get one turn.
    """
    parts, spent = inputs(tokens, learn, dtype), {name: [] for name in WAYS if fits(name, tokens)}
    for name in spent:
        if tokens <= 16384:
            run(WAYS[name], parts, learn)  # warm-up: compiles and fills caches
    for _ in range(turns):
        for name, seconds in spent.items():
            if not seconds or seconds[0] < 15:
                start = time.perf_counter()
                run(WAYS[name], parts, learn)
                seconds.append(time.perf_counter() - start)
    return {name: median(seconds) for name, seconds in spent.items()}


def resident(field: str) -> int:
    """Resident memory of this process in bytes: current (VmRSS) or peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def peak(name: str, tokens: int, learn: bool, dtype: str) -> int:
    """Peak memory of a run in bytes, inputs included, in this fresh process."""
    run(WAYS[name], inputs(2304, learn, dtype), learn)  # more tokens than are computed exactly
    before = resident("VmRSS")
    run(WAYS[name], inputs(tokens, learn, dtype), learn)
    return resident("VmHWM") - before


def peaks(tokens: int, learn: bool, dtype: str) -> dict[str, int]:
    figures = {}
    for name in WAYS:
        if fits(name, tokens):
            command = [
                sys.executable,
                __file__,
                "--peak",
                name,
                "--tokens",
                str(tokens),
                "--dtype",
                dtype,
                *["--learn"] * learn,
            ]
            done = subprocess.run(
                command, capture_output=True, text=True, check=True, env=os.environ
            )
            figures[name] = int(done.stdout.split()[-1])
    return figures


@torch.no_grad()
def decode(tokens: int, dtype: str, steps: int = 200) -> dict[str, float]:
    """Median seconds of one layer's attention for one more token with `tokens` cached ones."""
    query, key, value = (part.contiguous() for part in inputs(tokens + steps, False, dtype))
    hashed, buckets = RandomHash(DECODE.num_buckets, WIDTH), BucketCache(DECODE)
    buckets.append(hashed.key_codes(key[:, :, :tokens]))
    seconds: dict[str, list[float]] = {"ours": [], "sdpa": []}
    for t in range(tokens, tokens + steps):
        one = slice(t, t + 1)
        start = time.perf_counter()
        codes = hashed.query_codes(query[:, :, one], 4)
        buckets.append(hashed.key_codes(key[:, :, one]))
        buckets.attend(query[:, :, one], key, value, codes, WIDTH**-0.5)
        seconds["ours"].append(time.perf_counter() - start)
    # Not interleaved: a pass over all keys evicts ours from the processor's cache.
    for t in range(tokens, tokens + steps):
        keys, values = key[:, :, t - tokens : t + 1], value[:, :, t - tokens : t + 1]
        start = time.perf_counter()
        scaled_dot_product_attention(query[:, :, t : t + 1], keys, values, enable_gqa=True)
        seconds["sdpa"].append(time.perf_counter() - start)
    # The first step builds the rings.
    return {name: median(values[1:]) for name, values in seconds.items()}


def exponents(table: dict[int, dict[str, float]], least: int = 4096) -> dict[str, float]:
    """Slope of log time over log tokens for each implementation, from `least` tokens on."""
    slopes = {}
    for name in WAYS:
        rows = [(n, row[name]) for n, row in table.items() if name in row and n >= least]
        if len(rows) > 1:
            slopes[name] = float(np.polyfit(*np.log(np.array(rows)).T, 1)[0])
    return slopes


def crossover(table: dict[int, dict[str, float]]) -> float | None:
    """Number of tokens from which ours is faster than exact attention, interpolated between
    measured lengths; None if it never is.
    """
    ratios = [(n, row["sdpa"] / row["ours"]) for n, row in sorted(table.items()) if "sdpa" in row]
    if ratios[0][1] >= 1:
        return ratios[0][0]
    for (n, low), (more, high) in pairwise(ratios):
        if high >= 1:
            return float(n * (more / n) ** (np.log(1 / low) / np.log(high / low)))
    return None


def plot(figures: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5))
    tables = [
        ("forward, seconds", 1, figures["forward"]),
        ("forward and backward, seconds", 1, figures["training"]),
    ]
    for axis, (title, unit, table) in zip(
        axes, [*tables, ("training peak, MB", 1e6, figures["peak"])], strict=True
    ):
        for name in WAYS:
            rows = [(n, row[name] / unit) for n, row in table.items() if name in row]
            axis.loglog(*zip(*rows, strict=True), "o-", base=2, label=name)
        axis.set(title=title, xlabel="tokens", yscale="log")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, default=list(WAYS), help="measure only these"
    )
    parser.add_argument(
        "--add", action="store_true", help="add to the lengths that the file holds from before"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    add_output(parser, "attention_scaling")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("--learn", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if min(*options.tokens, options.turns) < 1:
        parser.error("--tokens and --turns must be at least 1")
    if options.peak:
        print(peak(options.peak, options.tokens[0], options.learn, options.dtype))
        return
    for name in set(WAYS) - set(options.ways):
        MOST[name] = 0
    figures: dict[str, Any] = {"shape": {"heads": HEADS, "key_heads": GROUPS, "head_dim": WIDTH}}
    figures["dtype"] = options.dtype
    figures |= {"forward": {}, "training": {}, "peak": {}, "decode": {}}
    if options.add:
        before = json.loads(options.json.read_text())
        if before["dtype"] != options.dtype:
            parser.error(f"{options.json} was measured in {before['dtype']}; name another --json")
        figures |= {name: {int(n): row for n, row in before[name].items()} for name in TABLES}
    for n in options.tokens:
        figures["forward"][n], figures["training"][n] = (
            times(n, learn, options.turns, options.dtype) for learn in (False, True)
        )
        figures["peak"][n], figures["decode"][n] = (
            peaks(n, True, options.dtype),
            decode(n, options.dtype),
        )
        print(n, json.dumps({name: figures[name][n] for name in TABLES}), flush=True)
        for name in ("forward", "training"):
            figures[f"{name}_exponent"] = exponents(figures[name])
            figures[f"{name}_crossover"] = crossover(figures[name])
        # After every length, so that an interrupted run keeps its figures.
        write(options.json, figures)
    plot(figures, options.json.with_suffix(".png"))


if __name__ == "__main__":
    run_main(main)
