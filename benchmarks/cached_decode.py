"""Decoding and prefill in the compiled runner after many cached tokens: LSH attention against full
attention.

    python benchmarks/cached_decode.py [--model smollm2-135m] [--lengths 0 2048 16384 65536]
        [--texts docs] [--rounds 7] [--threads 2] [--json FILE]

Each side prefills 2,048 tokens of TEXTS and fills the cache with copies of their pages, so that no
long prefill is needed. LSH attention has its default settings, with two exact layers. The sides
take turns: eight tokens one by one, then 512 tokens at once. `wall` is the time per token in
milliseconds, `processor` the processor time of all threads; `read` and `read processor` are those
of the 512 tokens. `ratio` is full attention's time over LSH attention's in the same round. On a
busy machine, measure processor time with one thread.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from entry import existing_path, run_main
from results import write
from turns import in_turn

from deepseek.compiled.abi import PAGE
from deepseek.compiled.runner import CompiledRunner
from deepseek.compiled.state import CompiledState
from deepseek.data.text.public import documents_at
from deepseek.engine.load import load
from deepseek.model.config import ModelConfig
from deepseek.model.transformer import DeepSeekModel
from deepseek.runner import Chunk

READ = 2048
PIECE = 512
STEPS = 8


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--lengths", nargs="+", type=int, default=[0, 2048, 16384, 65536])
    parser.add_argument("--texts", nargs="+", type=existing_path, default=[Path("docs")])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokenizer = load(options.model).tokenizer
    ids: list[int] = []
    for document in documents_at(options.texts):
        if len(ids) < READ:
            ids += tokenizer(document.text[: 4 * READ]).input_ids
    runners = {}
    for kind in ("lsh", "full"):
        model = load(options.model, config=ModelConfig(attention=kind)).model
        assert isinstance(model, DeepSeekModel)
        runners[kind] = CompiledRunner(model)
    figures = {}
    for length in options.lengths:
        turns = {kind: behind(runner, ids, length) for kind, runner in runners.items()}
        figures[length] = summary(in_turn(turns, options.rounds))
        print(length, json.dumps(figures[length]), flush=True)
    if options.json:
        write(options.json, {"model": options.model, "lengths": figures})


def behind(runner: CompiledRunner, ids: list[int], length: int) -> Callable[[], dict[str, float]]:
    """Return a side's turn: times per token and of a chunk after `length` cached tokens."""
    state = cached(runner, ids, length)

    def timed(pieces: list[list[int]]) -> tuple[float, float]:
        wall = time.perf_counter()
        processor = time.process_time()
        for piece in pieces:
            runner.forward([Chunk(state, piece)])
            state.rewind(length)
        ended = (time.perf_counter(), time.process_time())
        return 1000 * (ended[0] - wall), 1000 * (ended[1] - processor)

    def turn() -> dict[str, float]:
        wall, processor = timed([[token] for token in ids[:STEPS]])
        read, read_processor = timed([ids[:PIECE]])
        return {
            "wall": wall / STEPS,
            "processor": processor / STEPS,
            "read": read,
            "read processor": read_processor,
        }

    return turn


def cached(runner: CompiledRunner, ids: list[int], length: int) -> CompiledState:
    """Return a state with `length` cached tokens: repeated pages of the first 2,048 of a text."""
    total = max(length, READ) + PIECE
    state = runner.start(None, total)
    for start in range(0, READ, PIECE):
        runner.forward([Chunk(state, ids[start : start + PIECE])])
    state.reserve(total - READ)
    pages = state.parts[0].pages
    for place in range(READ // PAGE, len(pages)):
        pages[place][:] = pages[place % (READ // PAGE)]
    state.rewind(length)
    return state


def summary(found: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    """Return the medians of both sides and of their ratios."""
    rows = {}
    for clock in ("wall", "processor", "read", "read processor"):
        for kind, rounds in found.items():
            rows[f"{kind} {clock}"] = round(median(one[clock] for one in rounds), 2)
        ratios = [
            full[clock] / lsh[clock] for lsh, full in zip(found["lsh"], found["full"], strict=True)
        ]
        rows[f"ratio {clock}"] = round(median(ratios), 2)
    return rows


if __name__ == "__main__":
    run_main(main)
