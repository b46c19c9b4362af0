"""`deepseek distill-hash`: fit the hashes of LSH attention to a model's own attention."""

from pathlib import Path
from typing import Annotated

import typer

from deepseek.cli.options import Base


def distill_hash(
    base: Base = "smollm2-135m",
    data: Annotated[
        list[Path] | None,
        typer.Option(help="Text to learn from: a folder, .jsonl or .parquet file; default: Python's own."),
    ] = None,
    texts: Annotated[int, typer.Option(min=1, help="Number of texts.")] = 6,
    length: Annotated[int, typer.Option(min=512, help="Tokens of each.")] = 4096,
    buckets: Annotated[int, typer.Option(min=2, help="Buckets of keys; lsh_num_buckets of the model to be.")] = 64,
    window: Annotated[int, typer.Option(min=1, help="Keys of a bucket looked at; its lsh_bucket_window.")] = 40,
    exact: Annotated[int, typer.Option(min=0, help="First layers that keep exact attention.")] = 2,
    calibrate_only: Annotated[bool, typer.Option(help="Group keys, but do not learn what to probe.")] = False,
    seed: Annotated[int, typer.Option(help="Of texts and draws.")] = 0,
    out: Annotated[Path | None, typer.Option(help="File to write; default: beside the model.")] = None,
) -> None:
    """Learn which keys a frozen model's heads look for; interrupted, the same command goes on where it was."""
    import hashlib
    import shutil

    from deepseek.checkpoint.fingerprint import fingerprint
    from deepseek.checkpoint.hub import resolve
    from deepseek.data.text.encode import long_texts
    from deepseek.engine.load import load
    from deepseek.errors import ConfigError
    from deepseek.evaluate.quality import documents_at
    from deepseek.model.attention.hash import hash_file, save_hashes
    from deepseek.train.hash.distill import HashSettings, distill_hashes
    from deepseek.train.loop.progress import ProgressBar

    folder = resolve(base)
    model, tokenizer = load(base, dtype="float32")
    layers = range(exact, len(model.layers))
    if not layers:
        raise ConfigError(f"--exact {exact} leaves none of the {len(model.layers)} layers to LSH; give a lower number.")
    path, weights = out or hash_file(folder), fingerprint(folder).weights
    ids_RT = long_texts(documents_at(data or []), tokenizer, texts, length, seed)
    settings = HashSettings(
        num_buckets=buckets, bucket_window=window, seed=seed, **({"solver_steps": 0} if calibrate_only else {})
    )
    state = path.with_name(f"{path.name}.layers")
    identity = f"{weights} {hashlib.sha256(ids_RT.numpy().tobytes()).hexdigest()}"
    with ProgressBar() as progress:
        hashes = distill_hashes(model, ids_RT, settings, layers, state, identity=identity, progress=progress)
    save_hashes(path, hashes, weights)
    shutil.rmtree(state)
    print(path)
