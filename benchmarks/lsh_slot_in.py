"""What does SmolLM2 lose at 8,192 tokens when all layers but the first two get LSH attention? Loss on unseen text.

    python benchmarks/hash_recall.py                  # fits the hashes
    python benchmarks/lsh_slot_in.py

The same texts and the same fresh tokens for every model; the change of the loss is paired, text by text.
"""

import argparse
from typing import Any

import torch
from hash_recall import BASE, FIRST, PROBES, TEST, WINDOW, corpus, fitted
from results import save

import deepseek
from deepseek.data.encode import long_texts
from deepseek.model.attention.hash import plug_hashes
from deepseek.model.config import ModelConfig
from deepseek.train.distill_hash import HashSettings

PARTS = ("whole", "second half")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--texts", type=int, default=1, help="of each corpus")
    parser.add_argument("--window", type=int, help="keys of a bucket looked at")
    parser.add_argument("--probes", type=int, default=PROBES, help="buckets a query looks into")
    parser.add_argument("--skip-random", action="store_true", help="measure the distilled hash only")
    options = parser.parse_args()
    window = options.window or WINDOW[options.length]
    full, tokenizer = deepseek.load(BASE, dtype="float32")
    config = ModelConfig(
        attention="lsh", lsh_num_buckets=HashSettings().num_buckets, lsh_probes=options.probes,
        lsh_bucket_window=window, lsh_exact_layers=list(range(FIRST)),
    )  # fmt: skip
    distilled, _ = deepseek.load(BASE, config=config, dtype="float32")
    plug_hashes(distilled, fitted(full, tokenizer, "distilled"))
    models = {"distilled": distilled}
    if not options.skip_random:
        models["random"] = deepseek.load(BASE, config=config, dtype="float32").model
    rows = []
    for name in TEST:
        for ids_T in long_texts(corpus(name), tokenizer, options.texts, options.length, seed=1):
            row: dict[str, Any] = {"corpus": name, "exact": losses(full, ids_T)}
            row |= {kind: losses(model, ids_T) for kind, model in models.items()}
            rows.append(row)
            print(row, flush=True)
    changes = {
        kind: {part: sum(r[kind][part] for r in rows) / sum(r["exact"][part] for r in rows) - 1 for part in PARTS}
        for kind in models
    }
    for kind, change in changes.items():
        print(f"{kind:10}", "  ".join(f"{part} {change[part]:+.2%}" for part in PARTS))
    name = "lsh_slot_in" if options.probes == PROBES else f"lsh_slot_in_{options.probes}_probes"
    save(name, {"length": options.length, "probes": options.probes, "bucket_window": window, "texts": rows,
                "change": changes})  # fmt: skip


@torch.no_grad()
def losses(model: Any, ids_T: torch.Tensor) -> dict[str, float]:
    """Return the mean loss in nats per token over the whole text, and over its second half, where far keys matter."""
    logits_TV = model(ids_T[None], use_cache=False).logits[0, :-1]
    pairs = zip(logits_TV.split(1024), ids_T[1:].split(1024), strict=True)
    loss_T = torch.cat([torch.nn.functional.cross_entropy(*pair, reduction="none") for pair in pairs])
    return {"whole": float(loss_T.mean()), "second half": float(loss_T[len(loss_T) // 2 :].mean())}


if __name__ == "__main__":
    main()
