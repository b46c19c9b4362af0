"""How many experts dynamic routing uses on code and on prose, in mixtures trained here on both.

    python benchmarks/corpora.py public-code prose final-public-code final-public-prose
    python benchmarks/code_routing.py CORPORA [--tokens 3200000] [--seeds 0 1 2] [--json FILE]

A small mixture with the article's threshold of 0.7 and at most five experts per token is trained
from scratch on Python code and English prose in equal parts, once for each seed and each of two
settings: `controlled`, in which a temperature holds the mean over all tokens at `--target` experts,
and `free`, without a target. The router is not told which text is code. The mixtures are then run
on documents of other code bases and other prose; a document's figure is the mean number of experts
over its tokens and layers. `p` comes from a two-sided permutation test of the difference between
the means over documents. An interrupted run resumes.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from entry import existing_path, run_main
from numpy.typing import NDArray
from results import add_output, resumed, write

import deepseek
from deepseek.checkpoint.store import home
from deepseek.data import read_folder
from deepseek.model.transformer import DeepSeekModel
from deepseek.text.tokenizer import load_tokenizer

TRAINED = {"public-code": 1, "prose": 1}
KINDS = ("code", "prose")
MODEL = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 16,
    "expert_dim": 64,
    "num_shared_experts": 1,
    "routing_strategy": "dynamic",
    "routing_threshold": 0.7,
    "max_experts": 5,
}
SETTINGS = ("controlled", "free")
LENGTH, DOCUMENTS, PERMUTATIONS = 256, 200, 20_000
SHORTEST = 64
"""Shorter documents are skipped, in tokens."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("corpora", type=existing_path)
    parser.add_argument("--tokens", type=int, default=3_200_000, help="tokens of each training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--target", type=float, default=4.0, help="mean experts of `controlled`")
    parser.add_argument("--settings", choices=SETTINGS, nargs="+", default=SETTINGS)
    parser.add_argument(
        "--read",
        nargs=2,
        default=("final-public-code", "final-public-prose"),
        metavar=("CODE", "PROSE"),
        help="corpora of the documents",
    )
    parser.add_argument(
        "--work", type=Path, default=home() / "code-routing", help="the mixtures are kept here"
    )
    add_output(parser, "code_routing")
    options = parser.parse_args()
    resumed(options.work)
    runs = []
    for setting in options.settings:
        for seed in options.seeds:
            name = f"{setting}-{options.target:g}-{options.tokens}-tokens-seed-{seed}"
            folder = options.work / name
            model = trained(options, setting, seed, folder)
            runs.append(run(model, folder / "model", options, setting, seed))
            print(runs[-1], flush=True)
    figures = {
        setting: summary([found for found in runs if found["setting"] == setting])
        for setting in options.settings
    }
    print(figures)
    write(options.json, {"figures": figures, "runs": runs})


def trained(options: argparse.Namespace, setting: str, seed: int, folder: Path) -> DeepSeekModel:
    """Return a mixture trained from scratch, or the one that an earlier run has trained."""
    target = {"target_experts": options.target} if setting == "controlled" else {}
    settings = {
        "name": "routing",
        "tokens": options.tokens,
        "row_length": LENGTH,
        "batch_rows": 8,
        "learning_rate": 2e-3,
        "vocab_size": 4096,
        "domains": {
            name: {"folder": str(options.corpora / name), "weight": weight}
            for name, weight in TRAINED.items()
        },
        "model": MODEL | target,
        "seed": seed,
        "checkpoint_every": 10_000,
        "held_out_tokens": 4096,
        "samples": [],
        "out": str(folder / "model"),
        "run_folder": str(folder / "run"),
    }
    deepseek.pretrain(settings, quiet=True)
    return DeepSeekModel.from_pretrained(folder / "model").eval()


def run(
    model: DeepSeekModel, folder: Path, options: argparse.Namespace, setting: str, seed: int
) -> dict[str, Any]:
    """Return the mean number of experts that one mixture uses on documents of each kind."""
    tokenizer = load_tokenizer(folder)
    experts = {
        kind: np.array(list(documents_experts(model, tokenizer, options.corpora / name)))
        for kind, name in zip(KINDS, options.read, strict=True)
    }
    return {
        "setting": setting,
        "seed": seed,
        **{kind: float(found_D.mean()) for kind, found_D in experts.items()},
        "documents": {kind: len(found_D) for kind, found_D in experts.items()},
        "p": permutation_p(experts["code"], experts["prose"], seed),
    }


@torch.no_grad()
def documents_experts(model: DeepSeekModel, tokenizer: Any, folder: Path) -> Iterator[float]:
    """Yield the mean number of experts over tokens and layers for each of the first documents."""
    count = 0
    for document in read_folder(folder):
        ids = tokenizer.encode(document.text[: 20 * LENGTH])[:LENGTH]
        if len(ids) < SHORTEST:
            continue
        stats = model(torch.tensor([ids]), use_cache=False).router_stats
        yield float(np.mean([float(layer.mean_active) for layer in stats]))
        count += 1
        if count == DOCUMENTS:
            return


def permutation_p(a_N: NDArray[Any], b_M: NDArray[Any], seed: int) -> float:
    """Return the share of random splits, the observed one included, whose means differ at least as
    much as those of `a_N` and `b_M`.
    """
    rng = np.random.default_rng(seed)
    all_K = np.concatenate([a_N, b_M])
    observed = abs(a_N.mean() - b_M.mean())
    extreme = 1
    for _ in range(PERMUTATIONS):
        rng.shuffle(all_K)
        difference = abs(all_K[: len(a_N)].mean() - all_K[len(a_N) :].mean())
        extreme += bool(difference >= observed - 1e-12)
    return extreme / (PERMUTATIONS + 1)


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return means and ranges over seeds."""
    return {
        "code": mean(run["code"] for run in runs),
        "code_range": [min(run["code"] for run in runs), max(run["code"] for run in runs)],
        "prose": mean(run["prose"] for run in runs),
        "prose_range": [min(run["prose"] for run in runs), max(run["prose"] for run in runs)],
        "code_less_prose": [run["code"] - run["prose"] for run in runs],
        "largest_p": max(run["p"] for run in runs),
    }


if __name__ == "__main__":
    run_main(main)
