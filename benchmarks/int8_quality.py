"""What 8-bit weights cost: bytes, perplexity, divergence and greedy agreement of the compiled runner with fp32.

    python benchmarks/int8_quality.py TEXT... [--tokens 20000] [--prompts 200] [--json FILE]

TEXT are folders, .jsonl or .parquet files. Greedy agreement: the fp32 model continues the first 64 tokens of a row by
64; the runner reads the same tokens and is asked at each of the 64 places which token it would take. `whole` counts the
continuations at which it agrees everywhere.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from results import write
from torch import Tensor

import deepseek
from deepseek.evaluate.texts import documents_at
from deepseek.infer.compiled import CompiledRunner
from deepseek.infer.runner import Chunk
from deepseek.model.kv_cache import KVCache

ROW, OPENING, ANSWER = 512, 64, 64


def rows(tokenizer: Any, texts: list[Path], count: int) -> list[list[int]]:
    """Rows of 512 tokens, one from each document that is long enough, spread over all of them."""
    documents = [document for document in documents_at(texts) if len(document.text) > 6 * ROW]
    chosen = documents[:: max(1, len(documents) // count)][:count]
    found = [tokenizer(document.text[: 12 * ROW]).input_ids[:ROW] for document in chosen]
    return [row for row in found if len(row) == ROW]


def run(runner: CompiledRunner, ids: list[int]) -> Tensor:
    logits: Tensor = runner.forward([Chunk(runner.start(None, len(ids)), ids, "all")]).logits_RV
    return logits.double().log_softmax(-1)


@torch.inference_mode()
def perplexity(model: Any, runner: CompiledRunner, texts: list[list[int]]) -> dict[str, float]:
    sums = torch.zeros(3, dtype=torch.double)
    for ids in texts:
        exact, rough = model(torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1), run(runner, ids)
        targets = torch.tensor(ids[1:])[:, None]
        losses = [-one[:-1].gather(1, targets).mean() for one in (exact, rough)]
        sums += torch.stack([*losses, (exact.exp() * (exact - rough)).sum(-1).mean()])
    before, after, divergence = (sums / len(texts)).tolist()
    return {"nats fp32": before, "nats int8": after, "perplexity change": float(torch.tensor(after - before).expm1()),
            "divergence": divergence}  # fmt: skip


@torch.inference_mode()
def greedy(model: Any, runner: CompiledRunner, prompts: list[list[int]]) -> dict[str, Any]:
    cache, step = KVCache(), torch.tensor([row[:OPENING] for row in prompts])
    answers = []
    for _ in range(ANSWER):
        step = model(step, cache=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
        answers.append(step)
    answer_PT = torch.cat(answers, 1)
    agree_PT, margins = torch.zeros_like(answer_PT, dtype=torch.bool), []
    for p, row in enumerate(prompts):
        says = run(runner, row[:OPENING] + answer_PT[p, :-1].tolist())[OPENING - 1 :]
        agree_PT[p] = says.argmax(-1) == answer_PT[p]
        places_D = (~agree_PT[p]).nonzero().flatten()
        margins += (says[places_D].max(-1).values - says[places_D, answer_PT[p, places_D]]).tolist()
    return {
        "tokens": float(agree_PT.float().mean()), "whole": float(agree_PT.all(1).float().mean()),
        "median margin of a divergence in nats": float(torch.tensor(margins).median()) if margins else None,
        "largest": max(margins, default=None),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("texts", type=Path, nargs="*")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=20000)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model, tokenizer = deepseek.load(options.base, dtype="float32")
    runner = CompiledRunner(model)
    texts = rows(tokenizer, options.texts, max(options.tokens // ROW, options.prompts))
    size = runner.weight_bytes / sum(4 * p.numel() for p in model.parameters() if p.dim() > 1)
    figures = {"bytes of fp32": size, **perplexity(model, runner, texts[:: max(1, len(texts) * ROW // options.tokens)])}
    figures["greedy agreement"] = greedy(model, runner, texts[: options.prompts])
    figures["prompts"] = len(texts[: options.prompts])
    print(json.dumps(figures, indent=1))
    if options.json:
        write(options.json, figures)


if __name__ == "__main__":
    main()
