"""PEFT's Arrow as a rival of the experts' routing: it routes tokens to LoRA adapters by itself.

    python benchmarks/corpora.py many --out TEXTS --megabytes 1
    python benchmarks/arrow.py --texts TEXTS --adapters ADAPTERS [--counts 8 64] [--json FILE]

For each folder of TEXTS without "public" in its name, an adapter of PEFT is trained on the first
`--train-tokens` of its training text (rank 4, all linear layers of the base, AdamW with a cosine
schedule). `ArrowConfig(top_k=1)` then routes each token in each layer to one of the first adapters.
For each passage of `many_experts.py`, the adapter with the largest share of the routed tokens,
counted over all layers, is chosen. Arrow cannot choose none, so a threshold on that share is fitted
on passages of the training text; its authors do not do this.

    right, own, none    share of right decisions in per cent, as in `many_experts.py`
    own, always         the same for passages with an adapter, without the threshold
    embeddings          the embedding classifier of `many_experts.py`, on the same passages

Existing adapters are not trained again.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from many_experts import WITHOUT_EXPERT, Passage, embeddings, passages, pieces, share, shares
from peft import ArrowConfig, LoraConfig, PeftModel, create_arrow_model, get_peft_model
from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from results import add_output, write
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from deepseek.checkpoint.hub import resolve
from deepseek.data import clean, read_folder
from deepseek.data.text.document import split
from deepseek.engine.engine import Engine
from deepseek.engine.start import start_engine

RANK, ROW, ROWS = 4, 512, 4
"""Rank of the adapters; tokens per row; rows per step."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapters", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--train-tokens", type=int, default=12_000, help="of an adapter's text")
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--counts", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--passages", type=int, default=4, help="of each text")
    parser.add_argument("--length", type=int, default=128, help="tokens of a passage")
    add_output(parser, "arrow")
    options = parser.parse_args()
    folders = sorted(path for path in options.texts.iterdir() if path.is_dir())
    names = [path.name for path in folders if WITHOUT_EXPERT not in path.name]
    figures = {}
    with start_engine(options.base, dtype="float32") as engine:
        for name in names[: max(options.counts)]:
            if not (options.adapters / name).is_dir():
                train(engine, name, options)
        fitting, held_out = passages(engine, options, set(names))
        for count in options.counts:
            known = set(names[:count])
            asked, fitted = (
                [p if p.label in known else Passage(p.ids, None) for p in part]
                for part in (held_out, fitting)
            )
            row = arrow(options, names[:count], fitted, asked)
            row["embeddings"] = embeddings(engine, fitted, asked, known)
            print(count, row, flush=True)
            figures[str(count)] = row
    write(options.json, {"figures": figures})


def train(engine: Engine, name: str, options: argparse.Namespace) -> None:
    """Train and save the adapter of one folder."""
    documents, _ = clean(read_folder(options.texts / name))
    rows = pieces(engine, split(documents)[0], ROW)[: math.ceil(options.train_tokens / ROW)]
    torch.manual_seed(0)
    model = get_peft_model(
        stock(options.base), LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    )
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    steps = math.ceil(len(rows) / ROWS) * options.passes
    optimizer = torch.optim.AdamW(weights, lr=options.rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    loss = torch.zeros(())
    for number in range(options.passes):
        order = np.random.default_rng(number).permutation(len(rows))
        for start in range(0, len(rows), ROWS):
            loss = mean_loss(model, [rows[index] for index in order[start : start + ROWS]])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.save_pretrained(str(options.adapters / name))
    print(f"{name}: {steps} steps, loss {loss.item():.3f}", flush=True)


def stock(base: str) -> PreTrainedModel:
    """Return the base as a Transformers model."""
    return AutoModelForCausalLM.from_pretrained(resolve(base), dtype=torch.float32)


def mean_loss(model: torch.nn.Module, rows: Sequence[tuple[int, ...]]) -> Tensor:
    """Return the mean loss of rows of token ids, in nats per token; short rows are padded."""
    length = max(len(row) for row in rows)
    ids_BT = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])
    labels_BT = torch.tensor([[*row, *[-100] * (length - len(row))] for row in rows])
    with torch.autocast("cpu", torch.bfloat16):
        loss: Tensor = model(input_ids=ids_BT, labels=labels_BT).loss
    return loss


def arrow(
    options: argparse.Namespace,
    names: Sequence[str],
    fitting: Sequence[Passage],
    asked: Sequence[Passage],
) -> dict[str, Any]:
    """Return the shares of right decisions when Arrow routes to the adapters of `names`."""
    model = create_arrow_model(
        base_model=stock(options.base),
        task_specific_adapter_paths=[str(options.adapters / name) for name in names],
        arrow_config=ArrowConfig(top_k=1),
    ).eval()
    fitted, found = (votes(model, part, len(names)) for part in (fitting, asked))
    limit = best_threshold(fitted, [names.index(p.label) if p.label else -1 for p in fitting])
    decided = [names[row.argmax()] if row.max() >= limit else None for row in found]
    always = [
        names[row.argmax()] == p.label for row, p in zip(found, asked, strict=True) if p.label
    ]
    return {**shares(asked, decided), "own, always": share(always), "threshold": round(limit, 4)}


@torch.no_grad()
def votes(model: PeftModel, asked: Sequence[Passage], count: int) -> np.ndarray:
    """Return each adapter's share of the routed tokens of all layers, `[passages, adapters]`."""
    counted = torch.zeros(count)

    def count_votes(layer: ArrowLoraLinearLayer, inputs: tuple[Any, ...]) -> None:
        tokens_ND = inputs[0].flatten(0, -2).to(layer.prototypes.dtype)
        chosen_N = (tokens_ND @ layer.prototypes.T).abs().argmax(1)
        counted.add_(chosen_N.bincount(minlength=count))

    hooks = [
        module.register_forward_pre_hook(count_votes)
        for module in model.modules()
        if isinstance(module, ArrowLoraLinearLayer)
    ]
    rows = []
    for passage in asked:
        counted.zero_()
        model(input_ids=torch.tensor([passage.ids]))
        rows.append((counted / counted.sum()).numpy())
    for hook in hooks:
        hook.remove()
    return np.array(rows)


def best_threshold(votes_NE: np.ndarray, labels: Sequence[int]) -> float:
    """Return the threshold on the top share that makes most decisions right; label -1: no
    adapter.
    """
    top_N, chosen_N, labels_N = votes_NE.max(1), votes_NE.argmax(1), np.array(labels)
    limits = [0.0, *sorted(top_N)]
    right = [np.where(top_N >= limit, chosen_N, -1) == labels_N for limit in limits]
    return float(limits[int(np.argmax([flags.mean() for flags in right]))])


if __name__ == "__main__":
    main()
