"""Speed-up by drafting tokens from the text so far: tokens per step and per second, with and
without drafts, in turn.

    python benchmarks/guesses.py TEXT... [--prompts 8] [--json FILE]

TEXT are folders, .jsonl or .parquet files; each is reported separately. A prompt is the first 256
tokens of a document, the answer 128 tokens, greedy or sampled at temperature 0.7. One request runs
at a time, with 8-bit weights. The tokens must be the same with and without drafts.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from entry import existing_path, run_main
from results import write

import deepseek
from deepseek.compiled.runner import CompiledRunner
from deepseek.data.text.public import documents_at
from deepseek.engine import scheduler
from deepseek.engine.engine import Engine
from deepseek.engine.request import Request
from deepseek.engine.sampler import Sampling
from deepseek.errors import DataError

OPENING, ANSWER, MOST = 256, 128, scheduler.MAX_GUESSES


def prompts(tokenizer: Any, folder: Path, count: int) -> list[tuple[int, ...]]:
    documents = [
        document for document in documents_at([folder]) if len(document.text) > 6 * OPENING
    ]
    chosen = documents[:: max(1, len(documents) // count)][:count]
    return [
        tuple(tokenizer(document.text[: 12 * OPENING]).input_ids[:OPENING]) for document in chosen
    ]


def written(
    engine: Engine, prompt: tuple[int, ...], temperature: float, most: int
) -> tuple[list[Any], float, int]:
    """Return the tokens, and the seconds and steps after the first of them."""
    scheduler.MAX_GUESSES = most
    events = iter(
        engine.submit(
            Request(prompt, Sampling(ANSWER, temperature=temperature, seed=1), ignore_end=True)
        )
    )
    tokens, start, before = [next(events).token_id], time.perf_counter(), engine.stats().steps
    tokens += [event.token_id for event in events]
    return tokens, time.perf_counter() - start, engine.stats().steps - before


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("texts", type=existing_path, nargs="+")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model, tokenizer = deepseek.load(options.base)
    figures: dict[str, Any] = {"prompts": options.prompts, "answer": ANSWER}
    with Engine(model, tokenizer, CompiledRunner(model)) as engine:
        for folder in options.texts:
            for name, temperature in (("greedy", 0.0), ("sampled", 0.7)):
                sums = {0: [0.0, 0], MOST: [0.0, 0]}
                asked = prompts(tokenizer, folder, options.prompts)
                if not asked:
                    raise DataError(f"{folder} holds no document of {6 * OPENING} characters.")
                for prompt in asked:
                    texts = []
                    for most, own in sums.items():
                        tokens, seconds, steps = written(engine, prompt, temperature, most)
                        texts.append(tokens)
                        own[0], own[1] = own[0] + seconds, own[1] + steps
                    assert texts[0] == texts[1]
                count = len(asked) * (ANSWER - 1)  # a folder may have fewer than `--prompts`
                figures[f"{folder.name}, {name}"] = {
                    "tokens a step": count / sums[MOST][1],
                    "tokens a second": count / sums[MOST][0],
                    "without": count / sums[0][0],
                    "faster": sums[0][0] / sums[MOST][0],
                }
    print(json.dumps(figures, indent=1))
    if options.json:
        write(options.json, figures)


if __name__ == "__main__":
    run_main(main)
