"""Latency of the server under four streams, and the cost of HTTP per token.

    python benchmarks/latency.py [--seconds 60] [--streams 4] [--rounds 10] [--json FILE] [--plot FILE]

The server runs in its own process with default settings. Each stream sends a new request as soon as
its last one is answered: a unique prompt of 128 tokens, answered by 32 to 96 tokens. Reported are
the time from the request to its first token, and the time between two tokens, as the client sees
them. For the cost of HTTP, an engine in this process and the server answer the same prompts in
turn, `--rounds` times each; the cost per token is the difference of the median times between two
tokens of one stream.
"""

import argparse
import asyncio
import json
import random
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

from bars import draw
from entry import run_main
from results import write
from served import WORDS, percentile, served
from transformers import PreTrainedTokenizerFast

from deepseek.compiled.runner import CompiledRunner
from deepseek.engine.engine import Engine
from deepseek.engine.load import load
from deepseek.engine.request import Request
from deepseek.engine.sampler import Sampling

PROMPT, TOKENS = 128, 64
TOGETHER = 2.0  # seconds over which the streams start
MODEL = "smollm2-135m"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--plot", type=Path, default=Path("latency.png"), help="picture to draw")
    options = parser.parse_args()
    loaded = load(MODEL)
    with served(MODEL) as server:
        port = urlsplit(server.url).port
        assert port is not None
        prompts = Prompts(loaded.tokenizer)
        figures = asyncio.run(keep_asking(port, prompts, options.streams, options.seconds))
        with Engine(*loaded, CompiledRunner(loaded.model)) as engine:
            for streams in (1, options.streams):
                figures[f"http_{streams}_streams"] = overhead(
                    engine, port, prompts, streams, options.rounds
                )
    print(json.dumps(figures, indent=1))
    plot(figures, options.plot)
    if options.json:
        write(options.json, figures)


def plot(figures: dict[str, Any], path: Path) -> None:
    """Draw percentiles of the time to the first token and between two tokens."""
    panels = {}
    for title, key in (
        ("first token", "first_token_seconds"),
        ("between two tokens", "inter_token_seconds"),
    ):
        bars = {
            f"ours, {100 * float(share):g} %": 1000 * seconds
            for share, seconds in figures[key].items()
        }
        panels[f"{title}, ms, {figures['streams']} streams"] = bars
    draw(path, panels)


class Prompts:
    """Random texts of common words, exactly `PROMPT` tokens long."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer, self.random = tokenizer, random.Random(0)

    def next(self) -> tuple[int, ...]:
        """Return the ids of a new prompt."""
        return tuple(
            self.tokenizer(" ".join(self.random.choices(WORDS, k=PROMPT))).input_ids[:PROMPT]
        )


async def stream(port: int, prompt: tuple[int, ...], tokens: int) -> list[float]:
    """Send a request; return the times at which it was sent and each token arrived."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    asked: dict[str, Any] = {
        "model": MODEL,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
    }
    body = json.dumps(asked)
    times = [time.perf_counter()]
    writer.write(
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
    )
    async for line in reader:
        if line.startswith(b"data: {"):
            times.append(time.perf_counter())  # noqa: PERF401 - on arrival, not after all lines
    writer.close()
    return times


async def keep_asking(port: int, prompts: Prompts, streams: int, seconds: float) -> dict[str, Any]:
    """Return the latencies of `streams` streams that send requests without pause."""
    dice = random.Random(0)
    first: list[float] = []
    between: list[float] = []
    end = time.monotonic() + seconds

    async def one(index: int) -> None:
        # Staggered: starting all streams at once would be another measurement.
        await asyncio.sleep(index * TOGETHER / streams)
        while time.monotonic() < end:
            times = await stream(port, prompts.next(), dice.randint(TOKENS // 2, TOKENS * 3 // 2))
            first.append(times[1] - times[0])
            between.extend(after - before for before, after in pairwise(times[1:]))

    await asyncio.gather(*(one(index) for index in range(streams)))
    shares = (0.5, 0.9, 0.99, 1.0)
    return {
        "streams": streams,
        "answers": len(first),
        "tokens": len(first) + len(between),
        "first_token_seconds": {str(share): percentile(first, share) for share in shares},
        "inter_token_seconds": {str(share): percentile(between, share) for share in shares},
    }


def overhead(
    engine: Engine, port: int, prompts: Prompts, streams: int, rounds: int
) -> dict[str, float]:
    """Return the median time between two tokens of a stream, in the engine alone and over HTTP, and
    the difference, in milliseconds.
    """
    found: dict[str, list[float]] = {"engine": [], "http": []}
    for number in range(rounds + 1):
        texts = [prompts.next() for _ in range(streams)]
        alone, through = from_engine(engine, texts), asyncio.run(from_server(port, texts))
        if number:  # the first round is a warm-up
            found["engine"].append(alone)
            found["http"].append(through)
    paces = {f"{name}_ms": 1000 * median(values) for name, values in found.items()}
    costs = [http - alone for http, alone in zip(found["http"], found["engine"], strict=True)]
    return {**paces, "overhead_ms": 1000 * median(costs)}


def from_engine(engine: Engine, texts: list[tuple[int, ...]]) -> float:
    """Return the median seconds between two tokens of the last stream, which starts when the others
    are decoding.
    """
    generations = [engine.submit(Request(ids, Sampling(TOKENS, temperature=0.0))) for ids in texts]
    times = [time.perf_counter() for _ in generations[-1]]
    for generation in generations[:-1]:
        for _ in generation:
            pass
    return median(after - before for before, after in pairwise(times))


async def from_server(port: int, texts: list[tuple[int, ...]]) -> float:
    """Return the same over HTTP."""
    times = await asyncio.gather(*(stream(port, ids, TOKENS) for ids in texts))
    return median(after - before for before, after in pairwise(times[-1][1:]))


if __name__ == "__main__":
    run_main(main)
