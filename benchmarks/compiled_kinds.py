"""Speed and divergence of each kind of model in the compiled runner, beside the dense base and the
reference runner.

    python benchmarks/compiled_kinds.py [--model smollm2-135m] [--kinds dense dpe alibi window lsh]
        [--texts docs] [--rows 8] [--row 256] [--rounds 5] [--json FILE]

`dpe` has dynamic positions with random parameters, `alibi` linear biases instead of rotary
positions, `window` a sliding window of 128 tokens at every second layer, `lsh` LSH attention with
default settings, `narrow` the same with windows much shorter than a row of 256 tokens, and `far`
that with a far field and two rounds; `dense` and `stock` are the model as it is. The sides take
turns: a prefill of 512 tokens, then 64 tokens one by one. The reference runner, in its default
dtype, decodes eight tokens per turn. `ratio` is the kind's decoding speed over that of the first
kind in the same round. `divergence` is the mean KL divergence of the predictions from the fp32
model's, in nats, on rows of `--row` tokens of TEXTS; `reference divergence` is the reference
runner's, which rounds to bf16 if that is its dtype; and `equal` is the share of positions at which
the compiled runner and the fp32 model have the same most likely token.
"""

import argparse
import json
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from decode import STEPS, engine
from divergence import divergence, same_likeliest
from entry import existing_path, run_main
from int8_quality import run
from results import write
from turns import in_turn

from deepseek.compiled.runner import CompiledRunner
from deepseek.data.text.public import documents_at
from deepseek.engine.load import load
from deepseek.engine.runners import reference_runner
from deepseek.model.config import ModelConfig
from deepseek.model.positions.dynamic import DynamicBias
from deepseek.runner import Runner

NARROW = {"lsh_local_window": 32, "lsh_bucket_window": 8}
KINDS: dict[str, dict[str, Any]] = {
    "stock": {},
    "dense": {},
    "dpe": {"positional_encoding": "dpe"},
    "alibi": {"positional_encoding": "alibi"},
    "lsh": {"attention": "lsh"},
    "narrow": {"attention": "lsh", **NARROW},
    "far": {"attention": "lsh", "lsh_far_field": True, "lsh_rounds": 2, **NARROW},
    "window": {
        "sliding_window": 128,
        "num_hidden_layers": 30,
        "full_attention_layers": list(range(0, 30, 2)),
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["dense", "dpe"])
    parser.add_argument("--texts", nargs="+", type=existing_path, default=[Path("docs")])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--row", type=int, default=256, help="tokens in a row")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    options = parser.parse_args()
    tokenizer = load(options.model).tokenizer
    row = options.row
    documents = [tokenizer(one.text[: 8 * row]).input_ids for one in documents_at(options.texts)]
    rows = [ids[:row] for ids in documents if len(ids) >= row][: options.rows]
    quality = {}
    sides: dict[tuple[str, str], Runner] = {}
    for kind in options.kinds:
        exact = make_model(kind, options.model, "float32")
        compiled = CompiledRunner(exact)
        reference = reference_runner(make_model(kind, options.model, "auto"))
        quality[kind] = distance(exact, compiled, rows)
        quality[kind]["reference divergence"] = distance(exact, reference, rows)["divergence"]
        print(kind, json.dumps(quality[kind]), flush=True)
        sides[kind, "compiled"] = compiled
        sides[kind, "reference"] = reference
    speed = measure(sides, options.rounds)
    print(json.dumps(speed, indent=1))
    if options.json:
        write(options.json, {"model": options.model, "quality": quality, "speed": speed})


def make_model(kind: str, name: str, dtype: str) -> Any:
    """Return the model; parameters that would be zero at first are random."""
    model = load(name, config=ModelConfig(**KINDS[kind]), dtype=dtype).model
    randomise_positions(model)
    return model


def randomise_positions(model: torch.nn.Module) -> None:
    """Give dynamic positions random parameters; new ones are zero and have no effect."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, DynamicBias):
            parts = (module.distance_HN, module.context_HMN, module.decay_H, module.length_scale_H)
            for parameter in parts:
                torch.nn.init.normal_(parameter, std=0.005)


@torch.inference_mode()
def distance(model: Any, runner: Runner, rows: list[list[int]]) -> dict[str, float]:
    """Return the divergence of a runner's predictions from the model's, and their agreement."""
    exact = [
        model(torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
        for ids in rows
    ]
    rough = [run(runner, ids) for ids in rows]
    return {
        "divergence": mean(map(divergence, exact, rough)),
        "equal": mean(map(same_likeliest, exact, rough)),
    }


def measure(sides: dict[tuple[str, str], Runner], rounds: int) -> dict[str, dict[str, float]]:
    """Return the median speeds of all sides over the rounds, and their ratios to the first kind."""
    turns = {
        side: engine(runner, STEPS if side[1] == "compiled" else STEPS // 8)
        for side, runner in sides.items()
    }
    figures = in_turn(turns, rounds)
    first = next(iter(sides))[0]
    speed = {}
    for (kind, name), own in figures.items():
        pairs = zip(own, figures[first, name], strict=True)
        ratios = [mine["decode"] / other["decode"] for mine, other in pairs]
        medians = {key: round(median(one[key] for one in own), 1) for key in own[0]}
        speed[f"{kind} {name}"] = medians | {"ratio": round(median(ratios), 3)}
    return speed


if __name__ == "__main__":
    run_main(main)
