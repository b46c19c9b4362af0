"""What does SmolLM2 lose at 8,192 tokens when all layers but the first two get LSH attention? Loss
on unseen text.

    python benchmarks/hash_recall.py                  # fits the hashes
    python benchmarks/lsh_slot_in.py
    python benchmarks/lsh_slot_in.py --far-field --skip-random --tune 200
    python benchmarks/lsh_slot_in.py --test final-public-prose final-scrapy ...    # to report on

The same texts and the same fresh tokens for every model; the change of the loss is paired, text by
text. Probes, windows and tuning were chosen on the default texts, so that figures to report come from
others.

`--tune` trains the projections of attention in the LSH layers, hash and all other weights fixed,
towards the exact model's own predictions (KL from its distribution at every fourth token), on texts
of the corpora that the hashes were fitted on, one a step; none of them is scored. Shorter texts are
tuned on with windows as much smaller, so that the share of keys looked at stays. The labels of the
texts are not used, so that they cannot teach what the exact model does not know: what the tuned
model gains is what LSH had lost.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from entry import run_main
from hash_recall import BASE, FIRST, FIT, PROBES, TEST, WINDOWS, corpus, fitted
from results import FOLDER, write

import deepseek
from deepseek.data.text.encode import long_texts
from deepseek.model.attention.hash import plug_hashes
from deepseek.model.config import ModelConfig
from deepseek.model.precision import autocast
from deepseek.train.loop.optim import OptimConfig, adamw, clip_gradients, learning_rate

PARTS = ("whole", "second half")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument(
        "--test", nargs="+", default=TEST, metavar="CORPUS", help="texts that are scored"
    )
    parser.add_argument("--texts", type=int, default=1, help="of each corpus")
    parser.add_argument("--window", type=int, help="keys of a bucket looked at")
    parser.add_argument("--local", type=int, help="nearest keys looked at")
    parser.add_argument("--probes", type=int, help="buckets a query looks into")
    parser.add_argument(
        "--far-field", action="store_true", help="look at summaries of the rest, too"
    )
    parser.add_argument(
        "--tune", type=int, default=0, metavar="STEPS", help="then train so many steps, 200 at most"
    )
    parser.add_argument("--tune-length", type=int, default=4096, help="tokens of a step")
    parser.add_argument("--rate", type=float, default=3e-5, help="learning rate of tuning")
    parser.add_argument("--score-every", type=int, default=50, metavar="STEPS")
    parser.add_argument(
        "--skip-random", action="store_true", help="measure the distilled hash only"
    )
    parser.add_argument(
        "--json", type=Path, help="default: results/lsh_slot_in...json by its options"
    )
    options = parser.parse_args()
    windows = WINDOWS[options.length]
    looks = {
        "lsh_probes": options.probes or PROBES[options.length],
        "lsh_bucket_window": options.window or windows.bucket,
        "lsh_local_window": options.local or windows.local,
        "lsh_far_field": options.far_field,
    }
    full, tokenizer = deepseek.load(BASE, dtype="float32")
    config = ModelConfig(
        attention="lsh",
        lsh_num_buckets=windows.num_buckets,
        lsh_exact_layers=list(range(FIRST)),
        **looks,
    )
    distilled, _ = deepseek.load(BASE, config=config, dtype="float32")
    plug_hashes(distilled, fitted(full, tokenizer, "distilled"))
    models = {"distilled": distilled}
    if not options.skip_random:
        models["random"] = deepseek.load(BASE, config=config, dtype="float32").model
    texts = [
        (name, long_texts(corpus(name), tokenizer, options.texts, options.length, seed=1))
        for name in options.test
    ]
    figures = {kind: score(kind, model, texts) for kind, model in {"exact": full, **models}.items()}
    if options.tune:
        documents = [document for name in FIT for document in corpus(name)]
        lessons_RT = long_texts(documents, tokenizer, options.tune, options.tune_length, seed=2)
        scale = options.tune_length / options.length
        for step in tune(distilled, full, lessons_RT, options.rate, scale):
            if step % options.score_every == 0 or step == len(lessons_RT):
                kind = f"after {step} steps"
                figures[kind] = score(kind, distilled, texts)
                print(kind, change(figures[kind], figures["exact"]), flush=True)
    changes = {
        kind: change(one, figures["exact"]) for kind, one in figures.items() if kind != "exact"
    }
    for kind, parts in changes.items():
        print(f"{kind:20}", "  ".join(f"{part} {parts[part]:+.2%}" for part in PARTS))
    name = "lsh_slot_in" + (f"_{options.probes}_probes" if options.probes else "")
    name += "_far" * options.far_field + "_tuned" * bool(options.tune)
    write(
        options.json or FOLDER / f"{name}.json",
        {
            "length": options.length,
            "test": options.test,
            **looks,
            "tune": options.tune,
            "tune_length": options.tune_length,
            "rate": options.rate,
            "losses": figures,
            "change": changes,
        },
    )


def change(mine: list[dict[str, float]], base: list[dict[str, float]]) -> dict[str, float]:
    return {
        part: sum(row[part] for row in mine) / sum(row[part] for row in base) - 1 for part in PARTS
    }


def score(kind: str, model: Any, texts: list[tuple[str, torch.Tensor]]) -> list[dict[str, Any]]:
    """Return the losses of each text."""
    rows = [{"corpus": name} | losses(model, ids_T) for name, ids_RT in texts for ids_T in ids_RT]
    print(kind, rows, flush=True)
    return rows


def tune(
    model: Any, exact: Any, lessons_RT: torch.Tensor, rate: float, scale: float
) -> Iterator[int]:
    """Train the projections of attention in all layers but the first ones towards `exact`; yield
    after each step.

    Windows are `scale` of their size in the steps, and of their own size when a step is yielded.
    """
    config, steps = OptimConfig(rate), len(lessons_RT)
    model.requires_grad_(False)
    trained = {
        f"{layer}.{name}": parameter
        for layer, block in enumerate(model.layers[FIRST:], FIRST)
        for name, parameter in block.attention.named_parameters()
    }
    for parameter in trained.values():
        parameter.requires_grad_()
    optimizer = adamw(trained, config)
    layers = [block.attention for block in model.layers[FIRST:]]
    windows = layers[0].windows
    small = replace(
        windows, local=round(scale * windows.local), bucket=round(scale * windows.bucket)
    )
    for step, ids_T in enumerate(lessons_RT):
        started = time.perf_counter()
        model.train()
        for layer in layers:
            layer.windows = small
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step, steps)
        # Of every fourth token: the head is most of a step's cost, and neighbours teach much the
        # same.
        inputs = {"use_cache": False, "logits_to_keep": torch.arange(step % 4, len(ids_T), 4)}
        with autocast(model):
            with torch.no_grad():
                goal_TV = exact(ids_T[None], **inputs).logits[0]
            found_TV = model(ids_T[None], **inputs).logits[0]
            loss = torch.nn.functional.kl_div(
                found_TV.float().log_softmax(-1),
                goal_TV.float().log_softmax(-1),
                reduction="batchmean",
                log_target=True,
            )
        loss.backward()
        clip_gradients(trained.values(), config.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        for layer in layers:
            layer.windows = windows
        print(
            f"step {step + 1}/{steps} KL {float(loss):.5f} {time.perf_counter() - started:.0f} s",
            flush=True,
        )
        yield step + 1


@torch.no_grad()
def losses(model: Any, ids_T: torch.Tensor) -> dict[str, float]:
    """Return the mean loss in nats per token over the whole text, and over its second half, where
    far keys matter.
    """
    logits_TV = model(ids_T[None], use_cache=False).logits[0, :-1]
    pairs = zip(logits_TV.split(1024), ids_T[1:].split(1024), strict=True)
    loss_T = torch.cat(
        [torch.nn.functional.cross_entropy(*pair, reduction="none") for pair in pairs]
    )
    return {"whole": float(loss_T.mean()), "second half": float(loss_T[len(loss_T) // 2 :].mean())}


if __name__ == "__main__":
    run_main(main)
