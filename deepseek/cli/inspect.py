"""`deepseek inspect`: diagnostics of a model."""

from pathlib import Path
from typing import Annotated

import typer

from deepseek.cli.options import Base, Device
from deepseek.cli.output import echo

app = typer.Typer(add_completion=False)


@app.callback()
def inspect() -> None:
    """Diagnostics of a model."""


@app.command()
def attention(
    out: Annotated[Path, typer.Argument(help="Picture to write (PNG).")] = Path("attention.png"),
    base: Base = "smollm2-135m",
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text: a folder, .jsonl, .jsonl.gz or .parquet file; default: Python's own."
        ),
    ] = None,
    length: Annotated[int, typer.Option(min=512, help="Tokens of text to use.")] = 4096,
    probes: Annotated[int, typer.Option(min=1, help="Buckets probed by each query.")] = 10,
    window: Annotated[int, typer.Option(min=1, help="Keys per bucket: the most recent ones.")] = 48,
    hash_path: Annotated[
        Path | None, typer.Option("--hash", help="File of hashes; default: the one in the model.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Draw the share of attention that LSH attention keeps, by layer and head, and print the
    means.
    """
    import torch

    from deepseek.checkpoint.files import existing_path, writable_file
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
    from deepseek.model.language_model import own_model
    from deepseek.train.loop.progress import ProgressBar

    out = writable_file(out)
    texts = [existing_path(path) for path in data or []]  # before anything is loaded
    folder = resolve(base)
    hashes = load_hashes(hash_path or hash_file(folder), fingerprint(folder).weights)
    loaded_model, tokenizer = load(base, device=device, dtype="float32")
    model = own_model(loaded_model, "Inspection of the attention")
    first_hash = next(iter(hashes.values()))
    windows = Windows(local=128, sinks=4, bucket=window, num_buckets=first_hash.num_buckets)
    key_choices = {
        "local": local_keys(windows),
        "hash": hashed_keys(windows, min(probes, first_hash.num_buckets), hashes),
        f"best {length // 8}": best_keys(windows, length // 8),
    }
    results = {}
    with ProgressBar() as progress:
        ids_RT = long_texts(documents_at(texts), tokenizer, 1, length)
        for layer, recalls in attention_kept(model, ids_RT, key_choices, first_layer=min(hashes)):
            results[layer] = recalls
            progress(layer + 1, len(model.layers), "inspect")
    for name in key_choices:
        recall, error, keys = (
            torch.stack([getattr(recalls[name], field) for recalls in results.values()]).mean()
            for field in ("recall", "error", "keys")
        )
        echo(
            f"{name:10} keeps {recall:.1%} of the attention with {keys:.0f} keys per query, "
            f"output error {error:.1%}"
        )
    recall_LH = torch.stack([recalls["hash"].recall for recalls in results.values()])
    title = f"{base}, {length} tokens: attention kept by the hash"
    draw_recall(out, recall_LH, list(results), title)
    echo(out)
