"""Time to the first token with sets of experts, for a prompt that the base alone has already read.

    python benchmarks/shared_prefix.py [--rounds 3] [--length 1800] [--sets 5] [--json FILE]

One engine uses the compiled 8-bit runner. In every round the base reads a new prompt, then each of
`--sets` sets of one expert (random, of the usual width at the last three layers, with gates that
fire at every token) answers it. The same is done with a prefix cache that is not divided by layers;
the two take turns. The ratio is the time to the first token without sharing over that with it, as a
median over sets and rounds; on a busy machine the same ratio of processor time is more reliable.
All tokens and log probabilities must be bit for bit the same. Memory is that of the prefix cache
after the base has read a prompt.
"""

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from engine_batch import prompt_ids
from entry import run_main
from expert_cost import SPEAKS, save
from results import write

from deepseek.compiled.runner import CompiledRunner
from deepseek.engine import sequence
from deepseek.engine.engine import Engine
from deepseek.engine.load import load
from deepseek.engine.request import ExpertChoice, Request, TokenEvent
from deepseek.engine.sampler import Sampling

CHOOSE_CUTS = sequence.choose_cuts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--length", type=int, default=1800)
    parser.add_argument("--sets", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args()
    loaded = load(options.model)
    with (
        tempfile.TemporaryDirectory() as folder,
        Engine(*loaded, CompiledRunner(loaded.model)) as engine,
    ):
        names = [SPEAKS, *(f"{SPEAKS}-{number}" for number in range(1, options.sets))]
        for seed, name in enumerate(names):
            engine.plug(save(loaded, name, Path(folder), seed))
        figures = measure(engine, names, options.rounds, options.length)
    print(figures)
    if options.json:
        write(options.json, figures)


@dataclass(frozen=True)
class Answer:
    """The reply to one request.

    Attributes:
        seconds: time to the first token.
        processor_seconds: processor time of this process until then.
        reply: tokens and log probabilities.
    """

    seconds: float
    processor_seconds: float
    reply: list[Any]


def measure(engine: Engine, names: list[str], rounds: int, length: int) -> dict[str, Any]:
    """Return the times, the memory and the number of replies that differ."""
    answer(engine, prompt_ids(64, 0), ())  # compiles the step
    answers: dict[bool, list[Answer]] = {True: [], False: []}
    base = []
    prefix_bytes: dict[bool, int] = {}
    for number in range(rounds):
        prompt = prompt_ids(length, number + 1)
        for shared in (number % 2 == 0, number % 2 == 1):
            engine._scheduler.prefixes.shrink(0)
            sequence.choose_cuts = CHOOSE_CUTS if shared else lambda *_: ()
            base.append(answer(engine, prompt, ()))
            prefix_bytes[shared] = engine.stats().prefix_bytes
            answers[shared] += [answer(engine, prompt, (name,)) for name in names]
    pairs = [*zip(answers[False], answers[True], strict=True)]
    return {
        "prompt_tokens": length,
        "sets": len(names),
        "rounds": rounds,
        "base_first_token_seconds": round(median(one.seconds for one in base), 4),
        "first_token_seconds_shared": round(median(one.seconds for one in answers[True]), 4),
        "first_token_seconds_apart": round(median(one.seconds for one in answers[False]), 4),
        "times_sooner": round(median(a.seconds / b.seconds for a, b in pairs), 2),
        "times_less_processor_time": round(
            median(a.processor_seconds / b.processor_seconds for a, b in pairs), 2
        ),
        "replies_that_differ": sum(a.reply != b.reply for a, b in pairs),
        "cache_bytes_per_token_divided": round(prefix_bytes[True] / length),
        "cache_bytes_per_token_whole": round(prefix_bytes[False] / length),
    }


def answer(engine: Engine, prompt: tuple[int, ...], experts: tuple[str, ...]) -> Answer:
    """Return the reply of a set of experts to a prompt."""
    request = Request(
        prompt, Sampling(max_new_tokens=4), ExpertChoice(experts), ignore_end=True, logprobs=5
    )
    started = time.perf_counter()
    processor_started = time.process_time()
    events: list[TokenEvent] = []
    seconds = processor_seconds = 0.0
    for event in engine.submit(request):
        if not events:
            seconds = time.perf_counter() - started
            processor_seconds = time.process_time() - processor_started
        events.append(event)
    reply = [(event.token_id, event.logprob) for event in events]
    return Answer(seconds, processor_seconds, reply)


if __name__ == "__main__":
    run_main(main)
