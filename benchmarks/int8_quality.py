"""Cost of weights with 8 bits and fewer: bytes, perplexity, divergence from the fp32 model, and
greedy agreement with it.

    python benchmarks/int8_quality.py TEXT... [--base BASE...] [--bits 8 5 4] [--tokens 20000]
        [--prompts 200] [--formats Q8_0 Q4_K_M Q4_0 --llama PYTHON] [--json FILE]

TEXT are folders, .jsonl or .parquet files. With several bases, such as one model trained with
several seeds, each gets all figures. Three kinds of runner are compared with the fp32 model: the
compiled one with weights that it quantises to 8 bits itself ("nearest"), the same with weights that
`deepseek quantize` writes ("quantised 8", "quantised 5", ...), and the model in bf16, which shows
what a change of number format costs by itself. llama.cpp with weights in its own formats
(`--formats`) is measured too, except for greedy agreement.

Greedy agreement: the fp32 model generates 64 tokens after the first 64 of a row; the runner reads
the same tokens and predicts each of the 64. `whole` is the share of continuations on which it
agrees everywhere; the margin, in nats, is how much less likely the runner finds the fp32 model's
token than its own at the first difference.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from entry import existing_path, run_main
from llama_logits import llama_predictions, llama_quantise
from results import write
from torch import Tensor
from turns import add_llama

import deepseek
from deepseek.compiled.runner import CompiledRunner
from deepseek.data.text.public import documents_at
from deepseek.engine.torch_runner import TorchRunner
from deepseek.errors import DataError
from deepseek.export.gguf import export_gguf
from deepseek.export.quantize import quantize_model
from deepseek.model.kv_cache import KVCache
from deepseek.runner import Chunk, Runner

ROW, OPENING, ANSWER = 512, 64, 64


def rows(tokenizer: Any, texts: list[Path], count: int) -> list[list[int]]:
    """Return up to `count` rows of 512 tokens, one per long enough document, evenly spread."""
    documents = [document for document in documents_at(texts) if len(document.text) > 6 * ROW]
    chosen = documents[:: max(1, len(documents) // count)][:count]
    found = [tokenizer(document.text[: 12 * ROW]).input_ids[:ROW] for document in chosen]
    whole = [row for row in found if len(row) == ROW]
    if not whole:
        raise DataError(f"the texts hold no document of {ROW} tokens; name longer ones.")
    return whole


def run(runner: Runner, ids: list[int]) -> Tensor:
    logits: Tensor = runner.forward([Chunk(runner.start(None, len(ids)), ids, len(ids))]).logits_RV
    return logits.double().log_softmax(-1)


Predictions = Callable[[int], Tensor]
"""Index of a text -> log probabilities `[T, V]` after each of its tokens."""


@torch.inference_mode()
def perplexity(
    model: Any, sides: dict[str, Predictions], texts: list[list[int]]
) -> dict[str, dict[str, float]]:
    sums = {name: torch.zeros(3, dtype=torch.double) for name in sides}
    for number, ids in enumerate(texts):
        exact = model(torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)
        targets = torch.tensor(ids[1:])[:, None]
        for name, predictions in sides.items():
            rough = predictions(number)
            losses = [-one[:-1].gather(1, targets).mean() for one in (exact, rough)]
            sums[name] += torch.stack([*losses, (exact.exp() * (exact - rough)).sum(-1).mean()])
    found = {}
    for name, total in sums.items():
        before, after, divergence = (total / len(texts)).tolist()
        change = float(torch.tensor(after - before).expm1())
        found[name] = {
            "nats fp32": before,
            "nats": after,
            "perplexity change": change,
            "divergence": divergence,
        }
    return found


def llama_sides(
    base: str, options: argparse.Namespace, texts: list[list[int]], scratch: Path
) -> tuple[dict[str, Predictions], dict[str, int]]:
    """Return llama.cpp's predictions in each of its formats, and the sizes of the files in
    bytes.
    """
    sides: dict[str, Predictions] = {}
    sizes: dict[str, int] = {}
    source = scratch / "float16.gguf"
    export_gguf(base, source, "float16")
    for name in options.formats:
        path = scratch / f"{name}.gguf"
        llama_quantise(options.llama, source, path, name)
        found = llama_predictions(options.llama, path, np.array(texts), scratch)
        sides[f"llama.cpp {name}"] = lambda number, found=found: found[number].double()
        sizes[f"llama.cpp {name}"] = path.stat().st_size
    return sides, sizes


@torch.inference_mode()
def continued(model: Any, prompts: list[list[int]]) -> Tensor:
    """Return the model's greedy continuations of the prompts, `[P, 64]`."""
    cache, step, answers = KVCache(), torch.tensor([row[:OPENING] for row in prompts]), []
    for _ in range(ANSWER):
        step = model(step, cache=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
        answers.append(step)
    return torch.cat(answers, 1)


@torch.inference_mode()
def greedy(runner: Runner, prompts: list[list[int]], answer_PT: Tensor) -> dict[str, Any]:
    agree_PT, margins = torch.zeros_like(answer_PT, dtype=torch.bool), []
    for p, row in enumerate(prompts):
        says = run(runner, row[:OPENING] + answer_PT[p, :-1].tolist())[OPENING - 1 :]
        agree_PT[p] = says.argmax(-1) == answer_PT[p]
        if not agree_PT[p].all():
            first = int(agree_PT[p].int().argmin())
            margins.append(float(says[first].max() - says[first, answer_PT[p, first]]))
    return {
        "tokens": float(agree_PT.float().mean()),
        "whole": float(agree_PT.all(1).float().mean()),
        "by eighth of the answer": agree_PT.float().unflatten(1, (8, -1)).mean((0, 2)).tolist(),
        "not yet diverged by eighth": agree_PT.cumprod(1)[:, ANSWER // 8 - 1 :: ANSWER // 8]
        .float()
        .mean(0)
        .tolist(),
        "margins at the first divergence, quartiles": torch.tensor(margins or [0.0])
        .quantile(torch.tensor([0.25, 0.5, 0.75, 1.0]))
        .tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("texts", type=existing_path, nargs="+")
    parser.add_argument("--base", nargs="+", default=["smollm2-135m"])
    parser.add_argument("--tokens", type=int, default=20000)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--bits", type=float, nargs="+", default=[8])
    parser.add_argument("--formats", nargs="+", default=[], help="llama.cpp's, such as Q4_K_M")
    add_llama(parser)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.formats and options.llama is None:
        parser.error("llama.cpp is not there; name a Python that has it with --llama")
    found = [measured(base, options) for base in options.base]
    figures = found[0] if len(found) == 1 else {"bases": found}
    print(json.dumps(figures, indent=1))
    if options.json:
        write(options.json, figures)


def measured(base: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one base."""
    model, tokenizer = deepseek.load(base, dtype="float32")
    compiled = {"nearest": CompiledRunner(model)}
    with tempfile.TemporaryDirectory() as folder:
        for bits in options.bits:
            out = Path(folder) / f"int{bits:g}"
            quantize_model(base, out, bits=bits)
            written = deepseek.load(str(out), stored=True).model
            compiled[f"quantised {bits:g}"] = CompiledRunner(written)
    runners: dict[str, Runner] = {
        **compiled,
        "bf16": TorchRunner(deepseek.load(base, dtype="bfloat16")[0]),
    }
    texts = rows(tokenizer, options.texts, max(options.tokens // ROW, options.prompts))
    scored = texts[:: max(1, len(texts) * ROW // options.tokens)]
    sides: dict[str, Predictions] = {
        name: lambda number, runner=runner: run(runner, scored[number])
        for name, runner in runners.items()
    }
    numbers = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    sizes = {name: runner.weight_bytes for name, runner in compiled.items()}
    with tempfile.TemporaryDirectory() as folder:
        if options.formats:
            theirs, their_sizes = llama_sides(base, options, scored, Path(folder))
            sides |= theirs
            sizes |= their_sizes
        figures: dict[str, Any] = dict(perplexity(model, sides, scored))
    prompts = texts[: options.prompts]
    answer_PT = continued(model, prompts)
    for name, runner in runners.items():
        figures[name]["greedy agreement"] = greedy(runner, prompts, answer_PT)
    return figures | {
        "bytes of fp32": {name: size / (4 * numbers) for name, size in sizes.items()},
        "prompts": len(prompts),
    }


if __name__ == "__main__":
    run_main(main)
