"""Speed of sixteen streams against one on the reference runner, which runs every architecture.

    python benchmarks/torch_batch.py [--model smollm2-135m] [--kinds dmoe dpe lsh] [--json FILE]

The base is upcycled to 16 experts with dynamic routing (`dmoe`), given dynamic positions with
random parameters (`dpe`), or LSH attention (`lsh`); `dmoe+dpe` and `dmoe+lsh` combine two of these.
`stock` is the model as it is, which may be of another family. Every stream has its own prompt of
`--prompt` tokens (by default longer than LSH attention's local window), and all decode greedily,
without engine or sampler. One stream and sixteen take turns of `--steps` steps, so that other work
on the machine slows both alike; the figures are medians over the rounds. `agreement` is the largest
difference of logits between a stream run alone and beside others, and the share of steps with the
same most likely token.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from engine_batch import prompt_ids
from entry import run_main
from results import write

from deepseek.engine.load import load
from deepseek.engine.runners import reference_runner
from deepseek.model.config import ModelConfig
from deepseek.model.language_model import LanguageModel
from deepseek.model.positions.dynamic import DynamicBias
from deepseek.runner import Chunk, Runner, SequenceState

MIXTURE = {"num_experts": 16, "routing_strategy": "dynamic"}
KINDS: dict[str, dict[str, Any]] = {
    "stock": {},
    "dense": {},
    "dmoe": MIXTURE,
    "dpe": {"positional_encoding": "dpe"},
    "lsh": {"attention": "lsh"},
    "dmoe+dpe": {**MIXTURE, "positional_encoding": "dpe"},
    "dmoe+lsh": {**MIXTURE, "attention": "lsh"},
}
STREAMS = 16


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["dmoe", "dpe", "lsh"])
    parser.add_argument("--expert-dim", type=int, default=256, help="width of a routed expert")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args()
    figures = {kind: measure(kind, options) for kind in options.kinds}
    if options.json:
        write(options.json, {"streams": STREAMS, "figures": figures})


def make_model(kind: str, options: argparse.Namespace) -> LanguageModel:
    if kind == "stock":
        return load(options.model, dtype=options.dtype).model
    fields = dict(KINDS[kind])
    if "num_experts" in fields:
        fields["expert_dim"] = options.expert_dim
    model = load(options.model, config=ModelConfig(**fields), dtype=options.dtype).model
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, DynamicBias):  # with its initial zeros it would be skipped
            for parameter in (module.distance_HN, module.context_HMN, module.decay_H):
                torch.nn.init.normal_(parameter, std=0.005)
    return model


def measure(kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the speed of one stream and of sixteen, in turns."""
    model = make_model(kind, options)
    runner = reference_runner(model)
    capacity = options.prompt + options.steps * (options.rounds + 1) + 1
    prompts = [prompt_ids(options.prompt, number) for number in range(STREAMS + 1)]
    alone = Streams(runner, prompts[:1], capacity)
    together = Streams(runner, prompts[1:], capacity)
    seconds: dict[str, list[float]] = {"one": [], "sixteen": []}
    for number in range(options.rounds + 1):
        for name, streams in (("one", alone), ("sixteen", together)):
            taken = streams.decode(options.steps)
            if number:  # the first round is a warm-up
                seconds[name].append(taken)
    one = median(options.steps / taken for taken in seconds["one"])
    many = median(STREAMS * options.steps / taken for taken in seconds["sixteen"])
    ratios = [
        STREAMS * single / whole
        for single, whole in zip(seconds["one"], seconds["sixteen"], strict=True)
    ]
    figures = {
        "dtype": str(model.dtype).removeprefix("torch."),
        "tokens_per_s_one": round(one, 1),
        "tokens_per_s_sixteen": round(many, 1),
        "ratio": round(median(ratios), 2),
        "ratios": [round(ratio, 2) for ratio in ratios],
        "agreement": agreement(runner, prompts[1:], capacity),
    }
    print(kind, json.dumps(figures), flush=True)
    return figures


class Streams:
    """Sequences that decode greedily side by side.

    Args:
        runner: runs the forward passes.
        prompts: their prompts, prefilled at once in chunks of 64 tokens.
        capacity: maximum number of tokens per sequence.
    """

    def __init__(self, runner: Runner, prompts: Sequence[tuple[int, ...]], capacity: int) -> None:
        self.runner = runner
        self.states: list[SequenceState] = [runner.start(None, capacity) for _ in prompts]
        self.tokens: list[int] = []
        for state, prompt in zip(self.states, prompts, strict=True):
            for start in range(0, len(prompt), 64):
                output = runner.forward([Chunk(state, prompt[start : start + 64])])
            self.tokens.append(int(output.logits_RV[-1].argmax()))

    def decode(self, steps: int) -> float:
        """Decode `steps` tokens per sequence and return the seconds taken."""
        started = time.perf_counter()
        for _ in range(steps):
            self.tokens = self.step(self.tokens).argmax(-1).tolist()
        return time.perf_counter() - started

    def step(self, tokens: Sequence[int]) -> torch.Tensor:
        """Append a token to each sequence and return the logits `[B, V]`."""
        chunks = [Chunk(state, (token,)) for state, token in zip(self.states, tokens, strict=True)]
        return self.runner.forward(chunks).logits_RV


def agreement(
    runner: Runner, prompts: Sequence[tuple[int, ...]], capacity: int, steps: int = 16
) -> dict[str, float]:
    """Return the largest difference of logits and the share of equal tokens between four streams
    run alone and in a batch with all the others, on the same tokens.
    """
    together = Streams(runner, prompts, capacity)
    single = [Streams(runner, [prompt], capacity) for prompt in prompts[:4]]
    largest = 0.0
    equal = 0
    for _ in range(steps):
        logits_BV = together.step(together.tokens)
        for row, streams in enumerate(single):
            own_V = streams.step([together.tokens[row]])[0]
            largest = max(largest, float((own_V - logits_BV[row]).abs().max()))
            equal += int(own_V.argmax() == logits_BV[row].argmax())
        together.tokens = logits_BV.argmax(-1).tolist()
    return {"largest_difference": largest, "equal_tokens": equal / (steps * len(single))}


if __name__ == "__main__":
    run_main(main)
