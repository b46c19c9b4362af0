"""`deepseek inspect`: look inside a model."""

from pathlib import Path
from typing import Annotated

import typer

from deepseek.cli.options import Base

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback()
def inspect() -> None:
    """Look inside a model."""


@app.command()
def attention(
    out: Annotated[Path, typer.Argument(help="Picture to write (PNG).")] = Path("attention.png"),
    base: Base = "smollm2-135m",
    data: Annotated[
        list[Path] | None,
        typer.Option(help="Text: a folder, .jsonl or .parquet file; default: Python's own."),
    ] = None,
    length: Annotated[int, typer.Option(min=512, help="Tokens to look at.")] = 4096,
    probes: Annotated[int, typer.Option(min=1, help="Buckets that a query looks into.")] = 10,
    window: Annotated[int, typer.Option(min=1, help="Most recent keys of each.")] = 48,
    hash_path: Annotated[
        Path | None, typer.Option("--hash", help="Hashes; default: those beside the model.")
    ] = None,
) -> None:
    """Draw the share of attention that LSH attention keeps, by layer and head, and print its
    means.
    """
    import torch

    from deepseek.checkpoint.fingerprint import fingerprint
    from deepseek.checkpoint.hub import resolve
    from deepseek.data.text.encode import long_texts
    from deepseek.data.text.public import documents_at
    from deepseek.engine.load import load
    from deepseek.evaluate.attention_recall import (
        attention_kept,
        best_keys,
        draw_recall,
        hashed_keys,
        local_keys,
    )
    from deepseek.kernels.lsh.intervals import Windows
    from deepseek.model.attention.hash import hash_file, load_hashes
    from deepseek.train.loop.progress import ProgressBar

    folder = resolve(base)
    hashes = load_hashes(hash_path or hash_file(folder), fingerprint(folder).weights)
    model, tokenizer = load(base, dtype="float32")
    first = next(iter(hashes.values()))
    windows = Windows(local=128, sinks=4, bucket=window, num_buckets=first.num_buckets)
    ways = {
        "local": local_keys(windows),
        "hash": hashed_keys(windows, min(probes, first.num_buckets), hashes),
        f"best {length // 8}": best_keys(windows, length // 8),
    }
    found = {}
    with ProgressBar() as progress:
        ids_RT = long_texts(documents_at(data or []), tokenizer, 1, length)
        for layer, kept in attention_kept(model, ids_RT, ways, first_layer=min(hashes)):
            found[layer] = kept
            progress(layer + 1, len(model.layers), "inspect")
    for name in ways:
        recall, error, keys = (
            torch.stack([getattr(kept[name], what) for kept in found.values()]).mean()
            for what in ("recall", "error", "keys")
        )
        print(
            f"{name:10} keeps {recall:.1%} of the attention with {keys:.0f} keys a query, output off by {error:.1%}"
        )
    recall_LH = torch.stack([kept["hash"].recall for kept in found.values()])
    draw_recall(out, recall_LH, list(found), f"{base}, {length} tokens: attention kept by the hash")
    print(out)
