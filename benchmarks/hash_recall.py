"""How much of SmolLM2's attention a hash finds with one eighth of the keys, in layers 2 to 29, on
text that no hash was fitted on.

    python benchmarks/corpora.py code-a prose science code-b public-prose public-code
    python benchmarks/hash_recall.py          # 4,096 and 8,192 tokens; fits hashes first, once
    python benchmarks/hash_recall.py --layers 2 --lengths 4096 --json FILE    # a part, for trials
    python benchmarks/hash_recall.py --test code-c spanish office-en --indexer-rate 4e-3  # to tune

The distilled hash is compared with local window and sinks alone; a random hash of rotated and of
plain queries and keys; the calibrated hash; the learned indexer of DeepSeek Sparse Attention, which
scores every key and is trained on the same texts (`lightning_indexer.py`); and the exact best keys
within the same budget, an upper bound.
"""

import argparse
import time
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from entry import run_main
from lightning_indexer import Indexer, IndexerSettings, fit_indexer, indexed_keys, rotation
from results import add_output, write

import deepseek
import deepseek.train.hash
from deepseek.checkpoint.fingerprint import fingerprint
from deepseek.checkpoint.hub import resolve
from deepseek.checkpoint.store import home, read_json, write_json
from deepseek.data.text.encode import long_texts
from deepseek.data.text.public import documents_at
from deepseek.evaluate.attention_recall import (
    Choose,
    attention_kept,
    best_keys,
    draw_recall,
    hashed_keys,
    local_keys,
)
from deepseek.kernels.lsh.intervals import Windows
from deepseek.model.attention.hash import LinearHash, load_hashes, save_hashes
from deepseek.model.attention.lsh import RandomHash
from deepseek.train.hash.attention_inputs import stream_layers
from deepseek.train.hash.distill import HashSettings, distill_hashes
from deepseek.train.loop.progress import ProgressBar

BASE = "smollm2-135m"
FIT, TEST = ("code-a", "prose", "science"), ("code-b", "public-prose", "public-code")
FITTED = ("calibrated", "distilled")
INDEXERS = {"indexer": False, "indexer per group": True}
"""Whether each key/value head has its own indexer."""

FIRST = 2  # the first two layers attend broadly and stay exact
PROBES = {4096: 10, 8192: 14}
WINDOWS = {4096: Windows(128, 4, 48, 64), 8192: Windows(128, 4, 80, 64)}
"""Keys that a query attends to, by length: at most one eighth of all on average. Wider local
windows capture more attention, yet the model's loss rises more (docs/log/attention.md, 2026-11-26):
distant keys matter more than their share of attention.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=list(WINDOWS), choices=list(WINDOWS)
    )
    parser.add_argument(
        "--queries", type=int, default=48, help="queries of each text, in its second half"
    )
    parser.add_argument("--layers", type=int, help="measure only so many layers; default: all")
    parser.add_argument(
        "--test", nargs="+", default=TEST, metavar="CORPUS", help="texts that are measured"
    )
    parser.add_argument(
        "--indexer-steps", type=int, default=IndexerSettings().steps, help="training steps a layer"
    )
    parser.add_argument(
        "--indexer-rate",
        type=float,
        default=IndexerSettings().learning_rate,
        help="peak learning rate",
    )
    add_output(parser, "hash_recall")
    options = parser.parse_args()
    dials = IndexerSettings(steps=options.indexer_steps, learning_rate=options.indexer_rate)
    model, tokenizer = deepseek.load(BASE, dtype="float32")
    count = options.layers
    hashes: dict[str, Any] = {kind: fitted(model, tokenizer, kind, count) for kind in FITTED}
    hashes["random"] = random_hashes(model)
    seconds = {kind: read_json(path) for kind in FITTED if (path := timed(kind, count)).exists()}
    indexers, more_seconds = fit_indexers(model, tokenizer, dials, count)
    figures = {}
    for length in options.lengths:
        ids_RT = torch.cat(
            [long_texts(corpus(name), tokenizer, 1, length) for name in options.test]
        )
        figures[length] = measure(model, ids_RT, hashes, indexers, options.queries)
        print_table(length, figures[length])
        looks = {
            length: asdict(one) | {"probes": PROBES[length]} for length, one in WINDOWS.items()
        }
        write(
            options.json,
            {
                "fit": FIT,
                "test": options.test,
                "settings": asdict(HashSettings()),
                "windows": looks,
                "queries": options.queries,
                "indexer": asdict(dials),
                "seconds": seconds | more_seconds,
                "multiply_adds": multiply_adds(model, indexers, list(figures)),
                "figures": figures,
            },
        )
        draw(figures, options.json.with_suffix(".png"))


def corpus(name: str) -> list[Any]:
    return documents_at([home() / "corpora" / name])


def fit_texts(tokenizer: Any) -> torch.Tensor:
    documents = [document for name in FIT for document in corpus(name)]
    return long_texts(documents, tokenizer, 6, 4096)


def measured_layers(model: Any, count: int | None) -> range:
    """Return the first `count` layers after the two exact ones; None: all of them."""
    return range(FIRST, len(model.layers) if count is None else FIRST + count)


def fitted(
    model: Any, tokenizer: Any, kind: str, count: int | None = None
) -> dict[int, LinearHash]:
    """Return the hashes of a kind for `measured_layers`; the first call fits and saves them."""
    base, path = fingerprint(resolve(BASE)).weights, hash_file(kind, count)
    if not path.exists():
        started = time.perf_counter()
        settings = settings_of(kind)
        with ProgressBar() as progress:
            found = distill_hashes(
                model,
                fit_texts(tokenizer),
                settings,
                measured_layers(model, count),
                path.with_suffix(".layers"),
                progress=lambda done, total, _: progress(done, total, kind),
            )
        write_json(timed(kind, count), round(time.perf_counter() - started, 1))
        save_hashes(path, found, base)
    return load_hashes(path, base)


def settings_of(kind: str) -> HashSettings:
    """Return the settings to fit hashes of a kind; calibrated ones use no solver steps."""
    return HashSettings() if kind == "distilled" else HashSettings(solver_steps=0)


def hash_file(kind: str, count: int | None) -> Path:
    """Return the file of the hashes of a kind.

    Its name has a digest of the settings, texts and code of the fitting, so that hashes fitted
    before a change are not reused after it.
    """
    code = sorted(Path(deepseek.train.hash.__path__[0]).glob("*.py"))
    made_of = [repr(asdict(settings_of(kind))), repr(FIT), *(path.read_text() for path in code)]
    digest = sha256("\n".join(made_of).encode()).hexdigest()[:12]
    part = "" if count is None else f"-{count}"
    return home() / "hash-recall" / f"{kind}{part}-{digest}.safetensors"


def timed(kind: str, count: int | None) -> Path:
    """Return the file with the fitting time in seconds, which includes a pass of the model."""
    return hash_file(kind, count).with_suffix(".json")


def fit_indexers(
    model: Any, tokenizer: Any, dials: IndexerSettings, count: int | None
) -> tuple[dict[str, dict[int, Indexer]], dict[str, float]]:
    """Return indexers of each kind for the layers that have a hash, trained on the same texts, and
    the training times in seconds. "pass" is the time of the model's pass over the texts, which the
    times of the hashes include.
    """
    layers = measured_layers(model, count)
    windows, rotate = HashSettings().windows, rotation(model)
    found: dict[str, dict[int, Indexer]] = {name: {} for name in INDEXERS}
    seconds = dict.fromkeys([*INDEXERS, "pass"], 0.0)
    started = time.perf_counter()
    with ProgressBar() as progress:
        for layer, texts in stream_layers(model, fit_texts(tokenizer)):
            seconds["pass"] += time.perf_counter() - started
            for name, per_group in INDEXERS.items() if layer in layers else ():
                started = time.perf_counter()
                settings = replace(dials, per_group=per_group)
                found[name][layer] = fit_indexer(texts, settings, windows, rotate)
                seconds[name] += time.perf_counter() - started
            progress(layer + 1, layers.stop, "indexers")
            if layer + 1 == layers.stop:
                break
            started = time.perf_counter()
    return found, {name: round(value, 1) for name, value in seconds.items()}


def multiply_adds(
    model: Any, indexers: dict[str, dict[int, Indexer]], lengths: list[int]
) -> dict[int, dict[str, int]]:
    """Return the multiply-adds that a layer needs to choose the keys of a query, by number of keys;
    and, for comparison, those of the scores of all keys.
    """
    config = model.config
    heads = config.num_attention_heads
    hashed = (heads + config.num_key_value_heads) * config.head_dim * HashSettings().num_buckets
    return {
        length: {"hash": hashed, "scores of all keys": heads * config.head_dim * length}
        | {name: by_layer[FIRST].multiply_adds(length) for name, by_layer in indexers.items()}
        for length in lengths
    }


def random_hashes(model: Any) -> dict[int, RandomHash]:
    buckets, layers = HashSettings().num_buckets, range(len(model.layers))
    return {layer: RandomHash(buckets, model.config.head_dim, seed=layer) for layer in layers}


def measure(
    model: Any,
    ids_RT: torch.Tensor,
    hashes: dict[str, Any],
    indexers: dict[str, dict[int, Indexer]],
    queries: int,
) -> dict[str, Any]:
    """Return recall, relative error and number of keys of every method, by layer and as means over
    layers and heads.
    """
    length = ids_RT.shape[1]
    windows, probes = WINDOWS[length], PROBES[length]
    ways: dict[str, Choose] = {
        "local": local_keys(windows),
        "random, rotated": hashed_keys(windows, probes, hashes["random"], positioned=True),
        "random": hashed_keys(windows, probes, hashes["random"]),
        "calibrated": hashed_keys(windows, probes, hashes["calibrated"]),
        "distilled": hashed_keys(windows, probes, hashes["distilled"]),
    }
    for name, by_layer in indexers.items():
        ways[name] = indexed_keys(windows, length // 8, by_layer)
    ways["best"] = best_keys(windows, length // 8)
    last = max(hashes["distilled"])
    layers: dict[str, dict[int, dict[str, list[float]]]] = {name: {} for name in ways}
    with ProgressBar() as progress:
        for layer, kept in attention_kept(model, ids_RT, ways, queries, FIRST):
            for name, one in kept.items():
                layers[name][layer] = {
                    what: [round(value, 5) for value in getattr(one, what).tolist()]
                    for what in ("recall", "error", "keys")
                }
            progress(layer + 1, last + 1, f"{length} tokens")
            if layer == last:
                break
    return {name: means(by_layer) | {"layers": by_layer} for name, by_layer in layers.items()}


def means(by_layer: dict[int, dict[str, list[float]]]) -> dict[str, float]:
    return {
        what: float(torch.tensor([one[what] for one in by_layer.values()]).mean())
        for what in ("recall", "error", "keys")
    }


def print_table(length: int, figures: dict[str, Any]) -> None:
    print(f"{length} tokens, {length // 8} keys allowed")
    for name, one in figures.items():
        part = one["recall"] / figures["best"]["recall"]
        print(
            f"  {name:16} recall {one['recall']:.4f} ({part:.1%} of best)  error {one['error']:.4f}  "
            f"keys {one['keys']:.0f}"
        )


def draw(figures: dict[int, Any], path: Path) -> None:
    """Draw recall by layer for each method, and in a second picture the distilled hash's recall by
    layer and head.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(figures), 4), layout="constrained")
    for number, (length, ways) in enumerate(figures.items(), 1):
        axes = figure.add_subplot(
            1, len(figures), number, xlabel="layer", ylabel="attention kept", ylim=(0.2, 1.0)
        )
        axes.set_title(f"{length} tokens, budget {length // 8} keys a query")
        for name, one in ways.items():
            axes.plot(
                list(one["layers"]),
                [sum(row["recall"]) / len(row["recall"]) for row in one["layers"].values()],
                label=f"{name}: {one['recall']:.3f}, {one['keys']:.0f} keys",
                linewidth=1,
            )
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    length, ways = next(iter(figures.items()))
    by_layer = ways["distilled"]["layers"]
    recall_LH = torch.tensor([row["recall"] for row in by_layer.values()])
    title = f"{length} tokens: attention kept by the distilled hash"
    draw_recall(path.with_stem(f"{path.stem}_heads"), recall_LH, list(by_layer), title)


if __name__ == "__main__":
    run_main(main)
