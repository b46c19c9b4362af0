"""Time to plug and unplug experts, and cost of armed experts per token.

    python benchmarks/plug_time.py [--model smollm2-135m] [--packs 32] [--decode] [--json FILE]

Packs are random and as large as real ones (last three layers, width 1536, bf16: 16 MB for
SmolLM2-135M). Every plug reads a file and makes all checks: header, base fingerprint, digest,
signature, values. All packs are plugged one after another, into memory that is newly allocated from
the operating system but already backed by the host of a virtual machine, whose allocation can be
ten times slower and irregular. The medians of the first and the last quarter are compared, in wall
time and in processor time (which other work on the machine disturbs less).
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from entry import run_main
from results import write

from deepseek.engine.load import load
from deepseek.model.experts import ExpertModule
from deepseek.model.kv_cache import KVCache
from deepseek.model.transformer import DeepSeekModel
from deepseek.packs.pack import write_pack
from deepseek.packs.policy import PackPolicy
from deepseek.packs.signature import keygen, load_key


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--packs", type=int, default=32)
    parser.add_argument(
        "--decode", action="store_true", help="also time decoding with experts armed"
    )
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(1, get_context("spawn")) as other,
    ):
        # Another process writes the packs, so that this one cannot plug into freed memory.
        paths = other.submit(write_packs, options.model, Path(folder), options.packs).result()
        model = load(options.model).model
        figures = plug_times(model, paths)
        if options.decode:
            figures |= decode_times(model, paths)
        figures["pack_megabytes"] = round(paths[0].stat().st_size / 1e6, 2)
    for name, value in figures.items():
        print(f"{name:32} {value}")
    if options.json:
        write(options.json, {"figures": figures})


def write_packs(name: str, folder: Path, count: int) -> list[Path]:
    """Write signed random packs for the model `name` and return their paths."""
    model = load(name).model
    last, key = model.config.num_hidden_layers, load_key(keygen("bench", folder)[0])
    paths = [folder / f"e{i:02}.safetensors" for i in range(count)]
    for i, path in enumerate(paths):
        module = ExpertModule.beside(
            model.layers, path.stem, range(last - 3, last), width=1536, seed=i
        )
        for layer in module.layers:
            torch.nn.init.normal_(module.at(layer).down_proj, std=1e-3)
            always = torch.zeros(module.hidden_size + 1)
            always[-1] = 1.0  # fires at every token: the most expensive case
            module.set_gate(layer, always)
        write_pack(path, module.to_pack(model.experts.base, "Apache-2.0"), key)
    return paths


def plug_times(model: DeepSeekModel, paths: list[Path]) -> dict[str, Any]:
    """Plug and unplug all packs; return the times in milliseconds."""
    model.experts.policy = PackPolicy(signature="signed")
    # Touch and free as much memory, so that the host has already backed it.
    torch.ones(len(paths) * paths[0].stat().st_size)
    plugs = [timed(lambda path=path: model.experts.plug(path)) for path in paths]
    unplugs = [timed(lambda path=path: model.experts.unplug(path.stem)) for path in paths]
    figures, quarter = {}, max(1, len(paths) // 4)
    for clock, row in zip(("wall", "cpu"), zip(*plugs, strict=True), strict=True):
        first, last = median(row[:quarter]), median(row[-quarter:])
        figures |= {
            f"plug_first_{clock}_ms": round(first, 1),
            f"plug_last_{clock}_ms": round(last, 1),
            f"last_over_first_{clock}": round(last / first, 3),
            f"plug_worst_{clock}_ms": round(max(row), 1),
        }
    for clock, row in zip(("wall", "cpu"), zip(*unplugs, strict=True), strict=True):
        figures |= {
            f"unplug_median_{clock}_ms": round(median(row), 2),
            f"unplug_worst_{clock}_ms": round(max(row), 2),
        }
    return figures


@torch.no_grad()
def decode_times(model: DeepSeekModel, paths: list[Path]) -> dict[str, Any]:
    """Return milliseconds per token at batch 1 with nothing plugged, and with one and eight experts
    that are unarmed, or armed and fire at every token.
    """
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


def per_token(model: DeepSeekModel, tokens: int = 24) -> float:
    cache = KVCache()
    model(torch.arange(64)[None], cache=cache)
    step = torch.tensor([[1]])
    return round(median(timed(lambda: model(step, cache=cache))[0] for _ in range(tokens)), 2)


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    """Return the wall and processor time of `call` in milliseconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return (time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3


if __name__ == "__main__":
    run_main(main)
