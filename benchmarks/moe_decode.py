"""Decoding speed of a mixture of experts on the CPU beside the dense model it was upcycled from.

    python benchmarks/moe_decode.py [--base smollm2-135m] [--experts 16] [--expert-dim 256]
        [--rounds 5] [--threads 2] [--json FILE]

The base is upcycled with dynamic routing; `article` also has dynamic positions, with random
parameters. All run in the compiled step with 8-bit weights, the mixtures also in the reference
runner. The sides take turns in every round, and medians over the rounds are compared. A turn is a
prompt of 128 tokens, then tokens one by one, with one stream or sixteen.

The time of a memory-bound step is proportional to the weight bytes it reads: `byte_bound` is the
dense model's weight bytes over those that the mixture reads per token (at the measured mean number
of experts), and `share_of_byte_bound` is the ratio of speeds relative to that bound.

`divergence` is the mean Kullback-Leibler divergence of the compiled step from the model in fp32, in
nats per token, on a text of this repository. The output of newly upcycled experts is zero, so for
this comparison the routed experts are slices of the dense network, with a third of their output.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from compiled_kinds import randomise_positions
from divergence import divergence, same_likeliest
from entry import run_main
from results import write
from turns import in_turn

import deepseek
from deepseek.compiled.runner import CompiledRunner
from deepseek.engine.torch_runner import TorchRunner
from deepseek.model.config import ModelConfig
from deepseek.model.moe.layer import MoELayer
from deepseek.model.transformer import DeepSeekModel
from deepseek.runner import Chunk

PROMPT = 128
STEPS = 32
STREAMS = 16
TEXT = Path(__file__).parent.parent / "README.md"
TEXT_TOKENS = 512
LOUDNESS = 1 / 3  # factor on the routed experts' output when the divergence is measured


def ids_of(stream: int, count: int) -> list[int]:
    """Return `count` random token ids, different for each stream."""
    draw = torch.Generator().manual_seed(stream)
    return torch.randint(100, 40000, (count,), generator=draw).tolist()


def decoding(runner: Any, streams: int, steps: int = STEPS) -> Callable[[], float]:
    """Return a turn: tokens per second of all streams together."""

    def turn() -> float:
        texts = [ids_of(stream, PROMPT + steps) for stream in range(streams)]
        states = [runner.start(None, PROMPT + steps) for _ in range(streams)]
        for state, text in zip(states, texts, strict=True):
            runner.forward([Chunk(state, text[:PROMPT])])
        seconds = []
        for place in range(PROMPT, PROMPT + steps):
            chunks = [
                Chunk(state, [text[place]]) for state, text in zip(states, texts, strict=True)
            ]
            start = time.perf_counter()
            runner.forward(chunks)
            seconds.append(time.perf_counter() - start)
        return streams / median(seconds)

    return turn


@torch.no_grad()
def mean_experts(model: DeepSeekModel, ids: list[int]) -> float:
    """Return the mean number of routed experts per token and layer."""
    stats = model(torch.tensor([ids])).router_stats
    return float(torch.stack([layer.mean_active for layer in stats]).mean())


@torch.no_grad()
def slice_dense_network(model: DeepSeekModel) -> None:
    """Replace every routed expert by a scaled slice of its layer's dense network."""
    for module in model.modules():
        if isinstance(module, MoELayer):
            dense = module.shared_experts
            pool = module.pool
            assert dense is not None
            count, _, width = pool.down_proj.shape
            for expert in range(count):
                units = (torch.arange(width) + expert * width) % dense.down_proj.in_features
                gate = dense.gate_proj.weight[units]
                pool.gate_up_proj[expert] = torch.cat([gate, dense.up_proj.weight[units]])
                pool.down_proj[expert] = LOUDNESS * dense.down_proj.weight[:, units]


@torch.no_grad()
def distance(model: DeepSeekModel, ids: list[int]) -> dict[str, float]:
    """Return the divergence of the compiled step from the model in fp32, and their agreement."""
    expected = model.float()(torch.tensor([ids])).logits[0].log_softmax(-1)
    runner = CompiledRunner(model)
    output = runner.forward([Chunk(runner.start(None, len(ids)), ids, len(ids))])
    got = output.logits_RV.log_softmax(-1)
    return {
        "mean_nats": divergence(expected, got),
        "same_likeliest_token": same_likeliest(expected, got),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--expert-dim", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dense, tokenizer = deepseek.load(options.base)
    fields = {
        "num_experts": options.experts,
        "expert_dim": options.expert_dim,
        "routing_strategy": "dynamic",
    }
    mixture = deepseek.load(options.base, config=ModelConfig(**fields)).model
    fields["positional_encoding"] = "dpe"
    article = deepseek.load(options.base, config=ModelConfig(**fields)).model
    randomise_positions(article)
    models = {"dense": dense, "mixture": mixture, "article": article}
    runners = {name: CompiledRunner(model) for name, model in models.items()}
    turns = {name: decoding(runner, 1) for name, runner in runners.items()}
    turns |= {
        f"{name}, {STREAMS} streams": decoding(runner, STREAMS) for name, runner in runners.items()
    }
    turns |= {
        f"{name}, reference runner": decoding(TorchRunner(models[name]), 1, 8)
        for name in ("mixture", "article")
    }
    rates = in_turn(turns, options.rounds)
    rate = {name: median(values) for name, values in rates.items()}
    experts = mean_experts(mixture, ids_of(0, PROMPT + STEPS))
    bytes_of = {name: runner.weight_bytes for name, runner in runners.items()}
    routed = (bytes_of["mixture"] - bytes_of["dense"]) * experts / options.experts
    mixtures = [layer for layer in mixture.modules() if isinstance(layer, MoELayer)]
    routers = sum(4 * layer.router.weight.numel() for layer in mixtures)
    active = bytes_of["dense"] + routed + routers
    bound = bytes_of["dense"] / active
    ids = tokenizer(TEXT.read_text()).input_ids[:TEXT_TOKENS]
    distances = {"dense": distance(dense, ids)}
    slice_dense_network(mixture)
    distances["mixture"] = distance(mixture, ids)
    figures = {
        "tokens_per_second": rate,
        "mean_experts": experts,
        "weight_bytes": bytes_of | {"mixture, for a token": round(active)},
        "byte_bound": bound,
        "share_of_byte_bound": rate["mixture"] / rate["dense"] / bound,
        "over_reference_runner": {
            name: rate[name] / rate[f"{name}, reference runner"] for name in ("mixture", "article")
        },
        "article_over_mixture": median(
            one / other for one, other in zip(rates["article"], rates["mixture"], strict=True)
        ),
        "streams_over_one": {
            name: rate[f"{name}, {STREAMS} streams"] / rate[name] for name in runners
        },
        "divergence": distances,
        "rounds": rates,
    }
    print(json.dumps({key: value for key, value in figures.items() if key != "rounds"}, indent=1))
    if options.json:
        write(options.json, figures)


if __name__ == "__main__":
    run_main(main)
