"""Speed of the mixture-of-experts layer against the one in `transformers`, on the same weights.

    python benchmarks/moe_speed.py [--json benchmarks/results/moe_speed.json] [--seconds 1.5]

Both layers run in one process, in turn, and the medians are compared: ours against the fastest of
`grouped_mm`, `eager` and `batched_mm`. Other work on the machine slows both alike, so the ratio is
more stable than either time.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from entry import run_main
from results import write
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from deepseek.model.config import ModelConfig
from deepseek.model.moe.layer import MoELayer

SHAPES = [(576, 256, 32, 4), (1024, 512, 64, 8)]  # D, F, E, experts per token
TOKENS = [1, 32, 2048]
DTYPES = [torch.float32, torch.bfloat16]
IMPLEMENTATIONS = ["grouped_mm", "eager", "batched_mm"]
# Bytes; batched_mm copies the expert weights for every token, and is much slower beyond this.
BATCHED_LIMIT = 1 << 30


def layers(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[MoELayer, nn.Module]:
    """Return our layer and theirs, with the same weights."""
    hidden, width, experts, top_k = shape
    torch.manual_seed(0)
    ours = MoELayer(
        ModelConfig(
            hidden_size=hidden,
            num_attention_heads=4,
            num_experts=experts,
            expert_dim=width,
            max_experts=top_k,
            candidate_experts=top_k,
            routing_strategy="topk",
        ),
        0,
    ).to(dtype)
    theirs = Qwen3MoeSparseMoeBlock(
        Qwen3MoeConfig(
            hidden_size=hidden,
            moe_intermediate_size=width,
            num_experts=experts,
            num_experts_per_tok=top_k,
            norm_topk_prob=True,
        )
    ).to(dtype)
    theirs.gate.weight.data = ours.router.weight.data
    theirs.experts.gate_up_proj.data = ours.experts.gate_up_proj.data
    theirs.experts.down_proj.data = ours.experts.down_proj.data
    return ours.eval(), theirs.eval()


def forward(layer: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Any]:
    def run() -> None:
        with torch.no_grad():
            layer(x)

    return run


def both_ways(module: nn.Module, layer: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Any]:
    grad = torch.randn_like(x)
    x = x.clone().requires_grad_()

    def run() -> None:
        module.zero_grad(set_to_none=True)
        x.grad = None
        layer(x).backward(grad)

    return run


def timed(runs: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Return median milliseconds of each run, all taking turns for about `seconds` each; slow ones
    get three turns, very slow ones fewer.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    left = set(runs)
    while left:
        for name in sorted(left):
            start = time.perf_counter()
            runs[name]()
            times[name].append(time.perf_counter() - start)
            turns, spent = len(times[name]), sum(times[name])
            if turns >= 300 or spent > 10 * seconds or (turns >= 3 and spent > seconds):
                left.discard(name)
    return {name: median(values) * 1e3 for name, values in times.items()}


def compare(
    shape: tuple[int, int, int, int], dtype: torch.dtype, tokens: int, seconds: float
) -> dict[str, Any]:
    """Return one row of the table: forward and forward+backward times of ours and theirs."""
    ours, theirs = layers(shape, dtype)
    x = torch.randn(1, tokens, shape[0]).to(dtype)

    def run_ours(x: Tensor) -> Tensor:
        return ours(x, SimpleNamespace(token_mask_BT=None, router_stats=[], routing={}))

    def run_theirs(implementation: str) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            theirs.experts.config._experts_implementation = implementation
            return theirs(x)

        return run

    copies = tokens * shape[3] * 3 * shape[0] * shape[1] * dtype.itemsize
    names = [name for name in IMPLEMENTATIONS if name != "batched_mm" or copies <= BATCHED_LIMIT]
    difference = (run_ours(x) - run_theirs("eager")(x)).abs().max() / run_theirs("eager")(
        x
    ).abs().max()
    row: dict[str, Any] = {
        "shape": shape,
        "dtype": str(dtype)[6:],
        "tokens": tokens,
        "relative_difference": float(difference.detach()),
    }
    ways = {
        "forward": {"ours": forward(run_ours, x)}
        | {name: forward(run_theirs(name), x) for name in names},
        "forward_backward": {"ours": both_ways(ours, run_ours, x)}
        | {name: both_ways(theirs, run_theirs(name), x) for name in names},
    }
    for way, runs in ways.items():
        row[way] = timed(runs, seconds)
        row[way]["speedup"] = min(row[way][name] for name in names) / row[way]["ours"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="file to write the table to")
    parser.add_argument("--seconds", type=float, default=1.5, help="time spent on each timing")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument(
        "--shape", type=int, choices=range(len(SHAPES)), nargs="+", default=list(range(len(SHAPES)))
    )
    parser.add_argument(
        "--dtype",
        choices=[str(dtype)[6:] for dtype in DTYPES],
        nargs="+",
        default=[str(d)[6:] for d in DTYPES],
    )
    options = parser.parse_args()
    rows = []
    for shape in [SHAPES[i] for i in options.shape]:
        for dtype in [getattr(torch, name) for name in options.dtype]:
            for tokens in options.tokens:
                row = compare(shape, dtype, tokens, options.seconds)
                rows.append(row)
                print(
                    f"D{shape[0]} F{shape[1]} E{shape[2]} top-{shape[3]} {row['dtype']:8} {tokens:5} tokens",
                    end="",
                )
                for way in ("forward", "forward_backward"):
                    print(
                        f" | {way} "
                        + " ".join(f"{name} {value:.2f}" for name, value in row[way].items()),
                        end="",
                    )
                print(flush=True)
                if options.json:  # after every row, so that an interrupted run keeps its figures
                    write(options.json, {"milliseconds": rows})


if __name__ == "__main__":
    run_main(main)
