"""How long plugging and unplugging take, and what armed experts cost a token.

    python benchmarks/plug_time.py [--model smollm2-135m] [--packs 32] [--json benchmarks/results/plug_time.json]

Packs are random and of the size of a real one (last three layers, width 1536, bf16: 16 MB for SmolLM2-135M). Every plug
reads a file and makes every check: header, base fingerprint, digest, values. Signature checks are on. The first pack and
the last are compared as the median over `--rounds` rounds of plugging all packs and unplugging them again.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from deepseek.infer.load import load
from deepseek.model.experts import ExpertModule
from deepseek.model.kv_cache import KVCache
from deepseek.model.transformer import DeepSeekModel
from deepseek.packs.pack import write_pack
from deepseek.packs.policy import PackPolicy
from deepseek.packs.signature import keygen, load_key


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--packs", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args()
    model = load(options.model).model
    with tempfile.TemporaryDirectory() as folder:
        paths = write_packs(model, Path(folder), options.packs)
        figures = plug_times(model, paths, options.rounds) | decode_times(model, paths)
        figures["pack_megabytes"] = round(paths[0].stat().st_size / 1e6, 2)
    for name, value in figures.items():
        print(f"{name:32} {value}")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"environment": environment(), "figures": figures}, indent=1) + "\n")


def write_packs(model: DeepSeekModel, folder: Path, count: int) -> list[Path]:
    """Write signed random packs for `model` and return their paths."""
    last, key = model.config.num_hidden_layers, load_key(keygen("bench", folder)[0])
    paths = [folder / f"e{i:02}.safetensors" for i in range(count)]
    for i, path in enumerate(paths):
        module = ExpertModule.beside(model.layers, path.stem, range(last - 3, last), width=1536, init="normal", seed=i)
        for layer in module.layers:
            torch.nn.init.normal_(module.at(layer).down_proj, std=1e-3)
            always = torch.zeros(module.hidden_size + 1)
            always[-1] = 1.0  # fires at every token: the dearest case
            module.set_gate(layer, always)
        write_pack(path, module.to_pack(model.experts.base, "Apache-2.0"), key)
    return paths


def plug_times(model: DeepSeekModel, paths: list[Path], rounds: int) -> dict[str, Any]:
    """Return medians in milliseconds."""
    model.experts.policy = PackPolicy(signature="signed")
    plugs: list[list[float]] = []
    unplugs: list[list[float]] = []
    for round_index in range(rounds + 1):  # the first only warms the page cache up
        plug = [timed(lambda path=path: model.experts.plug(path)) for path in paths]
        unplug = [timed(lambda path=path: model.experts.unplug(path.stem)) for path in reversed(paths)]
        if round_index:
            plugs.append(plug)
            unplugs.append(unplug)
    by_rank = [median(column) for column in zip(*plugs, strict=True)]
    return {
        "plug_first_ms": round(by_rank[0], 2),
        "plug_last_ms": round(by_rank[-1], 2),
        "plug_median_ms": round(median(by_rank), 2),
        "plug_worst_ms": round(max(max(row) for row in plugs), 2),
        "unplug_median_ms": round(median(t for row in unplugs for t in row), 3),
        "unplug_worst_ms": round(max(max(row) for row in unplugs), 3),
        "last_over_first": round(by_rank[-1] / by_rank[0], 3),
    }


@torch.no_grad()
def decode_times(model: DeepSeekModel, paths: list[Path]) -> dict[str, Any]:
    """Return milliseconds a token at batch 1, with nothing plugged, and with some armed that all fire or never do."""
    figures: dict[str, Any] = {"decode_base_ms": per_token(model)}
    for count in (1, 8):
        for path in paths[:count]:
            model.experts.plug(path)
        with model.experts.arming(None):
            figures[f"decode_{count}_unarmed_ms"] = per_token(model)
        figures[f"decode_{count}_firing_ms"] = per_token(model)
        for path in paths[:count]:
            model.experts.unplug(path.stem)
    return figures


def per_token(model: DeepSeekModel, tokens: int = 48) -> float:
    cache = KVCache()
    model(torch.arange(64)[None], cache=cache)
    step = torch.tensor([[1]])
    return round(median(timed(lambda: model(step, cache=cache)) for _ in range(tokens)), 2)


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def environment() -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit.stdout.strip(),
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    main()
