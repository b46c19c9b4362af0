"""What plugged experts cost per decoding step: sixteen unarmed ones, one that fires at every token,
and one that never fires.

    python benchmarks/expert_cost.py [--rounds 20] [--tokens 64] [--streams 1 4] [--json FILE]

One engine runs the compiled 8-bit runner. Four states take turns in random order within every
round: nothing plugged; `--plugged` experts plugged but not armed; one of them armed that fires at
every token; one armed that never fires. The experts are random, of the usual width (512) at the
last three layers. The one that fires costs what a real expert costs on its own text; elsewhere a
real one costs only its gates, like the one that never fires. A turn is one generation per stream,
without drafted tokens (`benchmarks/guesses.py` measures those), so that each step generates one
token; its speed is the median time between two tokens. Ratios are medians over the rounds.
"""

import argparse
import random
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from engine_batch import prompt_ids
from entry import run_main
from results import write

from deepseek.compiled.runner import CompiledRunner
from deepseek.engine import scheduler
from deepseek.engine.engine import Engine
from deepseek.engine.load import Loaded, load
from deepseek.engine.request import ExpertChoice, Request
from deepseek.engine.sampler import Sampling
from deepseek.model.experts import ExpertModule
from deepseek.packs.pack import write_pack

WIDTH, LAYERS, PROMPT = 512, 3, 128
SPEAKS, SILENT = "speaks", "silent"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--plugged", type=int, default=16)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args()
    scheduler.MAX_GUESSES = 0
    loaded = load(options.model)
    figures: dict[str, Any] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        Engine(*loaded, CompiledRunner(loaded.model)) as engine,
    ):
        names = [SPEAKS, SILENT, *(f"other-{number}" for number in range(options.plugged - 2))]
        packs = [save(loaded, name, Path(folder), seed) for seed, name in enumerate(names)]
        for streams in options.streams:
            figures[f"streams_{streams}"] = found = measure(
                engine, packs, streams, options.rounds, options.tokens
            )
            print(streams, found, flush=True)
    if options.json:
        write(options.json, figures)


def save(loaded: Loaded, name: str, folder: Path, seed: int) -> Path:
    """Write a pack of a random expert; its gates fire at every token, or never if it is named
    `SILENT`.
    """
    blocks = loaded.model.layers
    module = ExpertModule.beside(
        blocks, name, range(len(blocks) - LAYERS, len(blocks)), WIDTH, seed=seed
    )
    for layer in module.layers:
        torch.nn.init.normal_(
            module.at(layer).down_proj, std=0.01, generator=torch.Generator().manual_seed(seed)
        )
        gate = torch.zeros(module.hidden_size + 1)
        gate[-1] = -1.0 if name == SILENT else 1.0
        module.set_gate(layer, gate)
    path = folder / f"{name}.safetensors"
    write_pack(path, module.requires_grad_(False).to_pack(loaded.model.experts.base, "Apache-2.0"))
    return path


def measure(
    engine: Engine, packs: list[Path], streams: int, rounds: int, tokens: int
) -> dict[str, float]:
    """Return the base's tokens per second, and the speed of the other states relative to it."""
    paces: dict[str, list[float]] = {state: [] for state in ("base", "unarmed", SPEAKS, SILENT)}
    for number in range(rounds + 1):
        order = list(paces)
        random.Random(number).shuffle(order)
        for state in order:
            for pack in packs:
                engine.plug(pack)
            for pack in packs if state == "base" else ():  # plugged too, so the prior work is equal
                engine.unplug(pack.stem)
            arm = (state,) if state in (SPEAKS, SILENT) else ()
            pace = decode(engine, ExpertChoice(arm), streams, tokens, number)
            for info in engine.experts():
                engine.unplug(info.name)
            if number:  # the first round is a warm-up
                paces[state].append(pace)
    shares = {
        f"{state}_share": median(
            base / other for base, other in zip(paces["base"], own, strict=True)
        )
        for state, own in paces.items()
        if state != "base"
    }
    return {"base_tokens_per_second": streams / median(paces["base"]), **shares}


def decode(engine: Engine, choice: ExpertChoice, streams: int, tokens: int, number: int) -> float:
    """Return the median seconds between two tokens of a stream while all streams decode."""
    sampling = Sampling(tokens, temperature=0.0)
    asked = [
        Request(prompt_ids(PROMPT, 100 * number + s), sampling, choice, ignore_end=True)
        for s in range(streams)
    ]
    generations = [engine.submit(request) for request in asked]
    times = []
    for event in generations[-1]:  # the last to start: the others are decoding already
        assert event.expert == (SPEAKS if choice.arm == (SPEAKS,) else None)
        times.append(time.perf_counter())
    for generation in generations[:-1]:
        for _ in generation:
            pass
    gaps = [after - before for before, after in pairwise(times)]
    return median(gaps[streams:])


if __name__ == "__main__":
    run_main(main)
