"""Compare a mixture of experts with shared pools with dense models: loss by number of parameters,
and speed.

    python benchmarks/corpora.py all
    python benchmarks/params.py CORPORA [--set design|final] [--seeds 3] [--tokens 500000] [--json FILE]

Five models are trained from scratch on the same text, with the same number of floating-point
operations, at each of `--rates`:

    dense           the model to match
    mixture         dynamic routing over pools shared by layers, 60 % of the parameters of `dense`
    own pools       dynamic routing with a pool in every layer, as many parameters as the mixture
    dense, total    a dense model with as many parameters as the mixture
    dense, active   a dense model with as many parameters as the mixture uses per token

`--kinds` also takes mixtures whose layers share pools in other ways (`SHARED_OTHERWISE`).

`--set design` is for choosing shapes and rates; the reported figures come from `final`, with other
text and other seeds. A model is judged by its loss on documents that no model was trained on, at
the rates of `RATES`. Differences from a dense model are taken seed by seed, each at its better
rate. An interrupted run resumes.

Then the mixture and the dense model of the first seed run in the compiled runner with 8-bit
weights, in turn: a prefill of 512 tokens, then decoding of the following text, one token at a time.

    python benchmarks/params.py CORPORA --speeds [--json FILE]

measures the same with random weights of `deepseek-29m`, limited to as many experts per token as the
trained mixture uses on average, and of its dense counterpart.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from entry import existing_path, run_main
from results import FOLDER, resumed, write
from turns import in_turn

import deepseek
from deepseek.checkpoint.store import home
from deepseek.compiled.runner import CompiledRunner
from deepseek.data import read_folder
from deepseek.model.config import ModelConfig
from deepseek.model.presets import PRESETS
from deepseek.model.transformer import DeepSeekModel
from deepseek.planning.architecture import Architecture
from deepseek.planning.sizes import parameters
from deepseek.runner import Chunk
from deepseek.text.tokenizer import load_tokenizer

SETS = {
    "design": ("public-code", "science", "prose", "german"),
    "final": ("final-public-code", "final-octave", "final-public-prose", "final-spanish"),
}
FIRST_SEED = {"design": 100, "final": 0}
VOCABULARY, ROW, ROWS = 2048, 256, 4

# A quarter of the width and half of the layers of `deepseek-29m` and its dense counterpart.
BACKBONE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
}
ROUTED = {
    "num_shared_experts": 1,
    "routing_strategy": "dynamic",
    "target_experts": 2.0,
    "intermediate_size": 512,
}
KINDS: dict[str, dict[str, Any]] = {
    "dense": {"intermediate_size": 512},
    "mixture": ROUTED | {"num_experts": 10, "expert_dim": 47, "expert_sharing": 3},
    "own pools": ROUTED
    | {"num_experts": 4, "max_experts": 4, "candidate_experts": 4, "expert_dim": 41},
    "dense, total": {"intermediate_size": 207},
    "dense, active": {"intermediate_size": 146},
}
SHARED_OTHERWISE: dict[str, dict[str, Any]] = {
    "pools of two layers": ROUTED
    | {"num_experts": 7, "candidate_experts": 7, "expert_dim": 45, "expert_sharing": 2},
    "narrow experts": ROUTED | {"num_experts": 20, "expert_dim": 26, "expert_sharing": 3},
    "three at most": KINDS["mixture"] | {"max_experts": 3},
}
"""Other mixtures with shared pools, of the same size, tried to find one that gains by sharing."""
SHAPES = KINDS | SHARED_OTHERWISE
RATES: dict[str, tuple[float, ...]] = dict.fromkeys(SHAPES, (0.004, 0.002)) | {"mixture": (4e-3,)}
"""Peak learning rates. 4e-3 was best on the design set; some seeds of the dense models do better at
half of it, so all kinds but `mixture` are trained with both, and the better one counts.
"""

MIXTURE_FIELDS = {"num_experts", "expert_dim", "num_shared_experts", "expert_sharing"}

PREFILL, DECODE = 512, 128


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpora", type=existing_path)
    parser.add_argument("--set", choices=SETS, default="final")
    parser.add_argument("--kinds", nargs="+", choices=SHAPES, default=list(KINDS))
    parser.add_argument("--rates", type=float, nargs="+", help="default: the chosen ones")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=500_000, help="of the dense model")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--speeds", action="store_true", help="of `deepseek-29m`")
    parser.add_argument("--work", type=Path, default=home() / "params", help="models are kept here")
    parser.add_argument("--json", type=Path, help="default: results/params.json, params_speed.json")
    options = parser.parse_args()
    if options.speeds:
        path = options.json or FOLDER / "params_speed.json"
        write(path, {"figures": full_size_speeds(options.rounds)})
        return
    resumed(options.work)
    runs = []
    for seed in range(FIRST_SEED[options.set], FIRST_SEED[options.set] + options.seeds):
        tokenizer = None  # all models use the first one's
        for kind in options.kinds:
            for rate in options.rates or RATES[kind]:
                runs.append(trained(options, kind, rate, seed, tokenizer))
                tokenizer = tokenizer or runs[-1]["folder"]
                print({name: value for name, value in runs[-1].items() if name != "folder"})
    figures = {"sizes": {kind: sizes(kind) for kind in options.kinds}, "losses": losses(runs)}
    if {"dense", "mixture"} <= set(options.kinds):
        folders = {run["kind"]: Path(run["folder"]) for run in reversed(runs)}
        figures["speed"] = trained_speeds(folders, options)
    print(json.dumps(figures, indent=1))
    for run in runs:
        del run["folder"]
    write(options.json or FOLDER / "params.json", {"figures": figures, "runs": runs})


def architecture(kind: str) -> dict[str, Any]:
    """Return the fields of a kind's config."""
    return BACKBONE | SHAPES[kind]


def sizes(kind: str) -> dict[str, float]:
    """Return a kind's total and active parameters, and both as shares of the dense model's."""
    found, dense = (parameters(Architecture.of(architecture(one))) for one in (kind, "dense"))
    return {
        "total": found.total,
        "active": found.active,
        "total_share": found.total / dense.total,
        "active_share": found.active / dense.active,
    }


def tokens_of(kind: str, dense_tokens: int) -> int:
    """Return the number of tokens that cost a kind as much as `dense_tokens` cost the dense model.

    A token costs six operations per active parameter, plus attention, which is the same for all
    kinds: 12 operations per layer, query dimension and visible key; half a row of keys on average.
    """
    attention = 12 * BACKBONE["num_hidden_layers"] * BACKBONE["hidden_size"] * ROW / 2
    costs = {one: 6 * sizes(one)["active"] + attention for one in (kind, "dense")}
    return round(dense_tokens * costs["dense"] / costs[kind])


def trained(
    options: argparse.Namespace, kind: str, rate: float, seed: int, tokenizer: str | None
) -> dict[str, Any]:
    """Train a model, unless that was done before, and return its figures.

    Args:
        options: the command's options.
        kind: a key of `SHAPES`.
        rate: peak learning rate.
        seed: seed of weights, order and held-out text.
        tokenizer: folder of a model with the tokenizer to use; None: train one.
    """
    work = options.work / f"{options.set}-{options.tokens}"
    folder = work / f"{kind.replace(', ', '-').replace(' ', '-')}-{rate:g}-{seed}"
    settings = {
        "name": "params",
        "tokens": tokens_of(kind, options.tokens),
        "row_length": ROW,
        "batch_rows": ROWS,
        "learning_rate": rate,
        "final_learning_rate": rate / 30,
        "vocab_size": VOCABULARY,
        "domains": {
            name: {"folder": str(options.corpora / name), "weight": 1} for name in SETS[options.set]
        },
        "model": architecture(kind),
        "seed": seed,
        "evaluate_every": 10**9,
        "held_out_tokens": 65_536,
        "samples": [],
        "out": str(folder / "model"),
        "run_folder": str(folder / "run"),
    }
    if tokenizer is not None:
        settings["tokenizer"] = tokenizer
    deepseek.pretrain(settings, quiet=True)
    found = json.loads((folder / "run" / "result.json").read_text())["figures"]
    return {
        "kind": kind,
        "rate": rate,
        "seed": seed,
        "tokens": found["tokens"],
        "seconds": found["seconds"],
        "loss": found["held_out_loss"],
        "folder": str(folder / "model"),
    }


def losses(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return each kind's losses by rate, the best for each seed, and their differences from the
    dense models' best.
    """
    kinds = dict.fromkeys(run["kind"] for run in runs)
    table: dict[str, Any] = {}
    for kind in kinds:
        of_kind = [run for run in runs if run["kind"] == kind]
        by_rate = {
            f"{rate:g}": [run["loss"] for run in of_kind if run["rate"] == rate]
            for rate in dict.fromkeys(run["rate"] for run in of_kind)
        }
        best = [min(losses) for losses in zip(*by_rate.values(), strict=True)]
        table[kind] = {"by_rate": by_rate, "best": best, "mean": mean(best)}
    for name, rival in (("over_dense", "dense"), ("over_total", "dense, total")):
        for kind in kinds if rival in kinds else ():
            pairs = zip(table[kind]["best"], table[rival]["best"], strict=True)
            table[kind][name] = [ours - theirs for ours, theirs in pairs]
    return table


def trained_speeds(folders: Mapping[str, Path], options: argparse.Namespace) -> dict[str, Any]:
    """Return the speeds of the trained dense model and mixture on text of their corpora, which may
    be training text.
    """
    text = "".join(
        document.text[:4000]
        for name in SETS[options.set]
        for document in list(read_folder(options.corpora / name))[-4:]
    )
    models = {kind: DeepSeekModel.from_pretrained(folders[kind]) for kind in ("dense", "mixture")}
    ids = load_tokenizer(folders["dense"])(text).input_ids[: PREFILL + DECODE]
    return speeds(models, ids, options.rounds)


def full_size_speeds(rounds: int) -> dict[str, Any]:
    """Return the speeds of `deepseek-29m` and its dense counterpart, with random weights."""
    shape = PRESETS["deepseek-29m"]
    most = int(ROUTED["target_experts"])
    fields = {
        "mixture": shape | {"max_experts": most, "candidate_experts": most},
        "dense": {name: value for name, value in shape.items() if name not in MIXTURE_FIELDS},
    }
    torch.manual_seed(0)
    models = {kind: DeepSeekModel(ModelConfig(**values)) for kind, values in fields.items()}
    ids = torch.randint(shape["vocab_size"], (PREFILL + DECODE,)).tolist()
    return speeds(models, ids, rounds)


def speeds(models: Mapping[str, DeepSeekModel], ids: list[int], rounds: int) -> dict[str, Any]:
    """Return the tokens per second of the mixture and the dense model, as medians and for each
    round, and the ratios of the medians.
    """
    turns = {kind: turn(CompiledRunner(model.eval()), ids) for kind, model in models.items()}
    found = in_turn(turns, rounds)
    rates = {
        kind: {name: median(one[name] for one in results) for name in results[0]}
        for kind, results in found.items()
    }
    ratios = {name: rates["mixture"][name] / rates["dense"][name] for name in rates["dense"]}
    experts = mean_experts(models["mixture"], ids)
    return {
        "tokens_per_second": rates,
        "mixture_over_dense": ratios,
        "mean_experts": experts,
        "rounds": found,
    }


def turn(runner: CompiledRunner, ids: list[int]) -> Callable[[], dict[str, float]]:
    """Return a turn: tokens per second of prefill and of decoding on the text `ids`."""

    def run() -> dict[str, float]:
        state = runner.start(None, len(ids))
        start = time.perf_counter()
        runner.forward([Chunk(state, ids[:PREFILL])])
        prefill = PREFILL / (time.perf_counter() - start)
        seconds = []
        for token in ids[PREFILL:]:
            start = time.perf_counter()
            runner.forward([Chunk(state, [token])])
            seconds.append(time.perf_counter() - start)
        return {"prefill": prefill, "decode": 1 / median(seconds)}

    return run


@torch.no_grad()
def mean_experts(model: DeepSeekModel, ids: list[int]) -> float:
    """Return the mean number of routed experts per token and layer."""
    stats = model(torch.tensor([ids])).router_stats
    return float(torch.stack([layer.mean_active for layer in stats]).mean())


if __name__ == "__main__":
    run_main(main)
