"""Tokens per second of the engine with 1, 4 and 16 concurrent requests, and of the runner alone.

    python benchmarks/engine_batch.py [--model smollm2-135m] [--runner compiled] [--streams 1 4 16] [--json FILE]

Every request has its own prompt of `--prompt` tokens and is answered by exactly `--tokens` tokens.
Measured are the time to the first token, and the tokens per second once every request has its first
token; the best of `--rounds` is reported. `runner_only` is one stream without the engine: the
runner computes one token after another.
"""

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from entry import run_main
from results import write

from deepseek.engine.engine import Engine
from deepseek.engine.load import load
from deepseek.engine.request import Request
from deepseek.engine.sampler import Sampling
from deepseek.engine.torch_runner import TorchRunner
from deepseek.model.transformer import DeepSeekModel
from deepseek.runner import Chunk, Runner


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--runner", choices=("torch", "compiled"), default="torch")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args()
    loaded = load(options.model)
    runner = make_runner(options.runner, loaded.model)
    sampling = Sampling(options.tokens, temperature=options.temperature, top_p=0.95, seed=0)
    figures: dict[str, Any] = {"runner": options.runner}
    with Engine(*loaded, runner, max_running=max(options.streams)) as engine:
        for streams in options.streams:
            rounds = [
                run(engine, streams, options.prompt, sampling, number)
                for number in range(options.rounds + 1)
            ]
            best = max(rounds[1:], key=lambda one: one["tokens_per_s"])
            figures[f"streams_{streams}"] = best
            print(streams, best, flush=True)
    figures["runner_only"] = round(
        max(alone(runner, options.prompt, options.tokens) for _ in range(options.rounds)), 1
    )
    print("runner only", figures["runner_only"])
    if options.json:
        write(options.json, {"figures": figures})


def make_runner(name: str, model: DeepSeekModel) -> Runner:
    if name == "torch":
        return TorchRunner(model)
    from deepseek.compiled.runner import CompiledRunner

    return CompiledRunner(model)


def prompt_ids(length: int, number: int) -> tuple[int, ...]:
    """Return the ids of a prompt; no two numbers share a prefix."""
    generator = torch.Generator().manual_seed(number)
    return tuple(torch.randint(1000, 40_000, (length,), generator=generator).tolist())


def run(
    engine: Engine, streams: int, length: int, sampling: Sampling, number: int
) -> dict[str, float]:
    """Answer `streams` requests at once and return their speed."""
    prompts = [prompt_ids(length, 1000 * number + 20 * streams + n) for n in range(streams)]
    started = time.perf_counter()
    generations = [engine.submit(Request(prompt, sampling, ignore_end=True)) for prompt in prompts]
    iterators = [iter(generation) for generation in generations]
    firsts = []
    for events in iterators:
        next(events)
        firsts.append(time.perf_counter() - started)
    written = sum(generation.usage.completion_tokens for generation in generations)
    left, begun = streams * sampling.max_new_tokens - written, time.perf_counter()
    for events in iterators:
        for _ in events:
            pass
    return {
        "tokens_per_s": round(left / (time.perf_counter() - begun), 1),
        "first_token_ms_median": round(1000 * median(firsts), 1),
        "first_token_ms_last": round(1000 * firsts[-1], 1),
    }


def alone(runner: Runner, length: int, tokens: int) -> float:
    """Return the tokens per second of the runner alone, for one greedy sequence."""
    state = runner.start(None, length + tokens)
    output = runner.forward([Chunk(state, prompt_ids(length, 0))])
    started = time.perf_counter()
    for _ in range(tokens):
        output = runner.forward([Chunk(state, (int(output.logits_RV[-1].argmax()),))])
    return tokens / (time.perf_counter() - started)


if __name__ == "__main__":
    run_main(main)
