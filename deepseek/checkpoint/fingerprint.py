"""What identifies a base model: a digest of its weights and one of its tokenizer.

An expert pack names the base it was trained on by these two, so they depend on the values alone: not on the number of
shards, their order, file names or metadata.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from deepseek.checkpoint.store import canonical_json, home, read_json, write_json
from deepseek.errors import CheckpointError

HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors library
BLOCK = 1 << 22  # bytes read at a time


@dataclass(frozen=True)
class Fingerprint:
    """SHA-256 digests, in hexadecimal, of a model's weights and tokenizer ("" if it has no tokenizer.json)."""

    weights: str
    tokenizer: str


def weight_files(folder: str | Path) -> list[Path]:
    """Return the safetensors files that make up the model in `folder`.

    Some folders hold the same weights twice in different layouts, so an index, then `model.safetensors`, come first.
    Raises `CheckpointError` if there is none or a shard is missing.
    """
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = [folder / name for name in _shards(index)]
    elif (folder / "model.safetensors").is_file():
        files = [folder / "model.safetensors"]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder} holds no .safetensors weights; save the model with save_pretrained first.")
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file} is missing though the index names it; download the model again.")
    return files


def fingerprint(folder: str | Path) -> Fingerprint:
    """Return the fingerprint of a model folder; computed once per state of its files, then read from the cache.

    Raises `CheckpointError` if a file is missing or malformed.
    """
    folder = Path(folder)
    files = weight_files(folder)
    tokenizer = folder / "tokenizer.json"
    sources = [*files, tokenizer] if tokenizer.is_file() else files
    states = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in sources]
    cached = home() / "fingerprints" / f"{hashlib.sha256(canonical_json(states)).hexdigest()}.json"
    if cached.is_file():
        return Fingerprint(**read_json(cached))
    result = Fingerprint(
        weights=weights_digest(files), tokenizer=tokenizer_digest(tokenizer) if tokenizer.is_file() else ""
    )
    write_json(cached, asdict(result))
    return result


def weights_digest(files: list[Path]) -> str:
    """Return the SHA-256 over the sorted (name, dtype, shape, SHA-256 of the bytes) of all tensors in `files`."""
    spans = sorted(span for file in files for span in _spans(file))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = pool.map(_span_digest, spans)
        table = [(span.name, span.dtype, span.shape, digest) for span, digest in zip(spans, digests, strict=True)]
    return hashlib.sha256(canonical_json(table)).hexdigest()


def tokenizer_digest(path: Path) -> str:
    """Return the SHA-256 over vocabulary, merges and added tokens of a tokenizer.json."""
    content = read_json(path)
    try:
        model = content["model"]
        # Older files write a merge as "a b", newer ones as ["a", "b"].
        merges = [m.split(" ") if isinstance(m, str) else m for m in model.get("merges") or ()]
        added = sorted((t["id"], t["content"], bool(t["special"])) for t in content.get("added_tokens") or ())
        return hashlib.sha256(canonical_json([model["vocab"], merges, added])).hexdigest()
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not a tokenizer file; download the model again.") from error


@dataclass(frozen=True, order=True)
class _Span:
    """Where one tensor's bytes lie."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    stop: int


def _shards(index: Path) -> list[str]:
    """Return the shard names of an index; only plain names, so that an index cannot point outside its folder."""
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    names = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
    if not names or any(Path(name).name != name for name in names):
        raise CheckpointError(f"{index} is not a valid shard index; download the model again.")
    return names


def _spans(path: Path) -> Iterator[_Span]:
    """Give the tensors of a safetensors file: 8 bytes of header length, a JSON header, then the tensors' bytes."""
    with open(path, "rb") as file:
        header, base = _read_header(file, path), file.tell()
    header.pop("__metadata__", None)
    size = path.stat().st_size
    for name, entry in header.items():
        try:
            start, stop = entry["data_offsets"]
            span = _Span(name, entry["dtype"], tuple(entry["shape"]), path, base + start, base + stop)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} has a malformed header; download the model again.") from error
        if not base <= span.start <= span.stop <= size:
            raise CheckpointError(f"{path} is truncated (tensor {name!r}); download the model again.")
        yield span


def _read_header(file: BinaryIO, path: Path) -> dict[str, Any]:
    length = int.from_bytes(file.read(8), "little")
    try:
        header = json.loads(file.read(length)) if 0 < length <= HEADER_LIMIT else None
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is not a safetensors file; download the model again.")
    return header


def _span_digest(span: _Span) -> str:
    digest = hashlib.sha256()
    with open(span.path, "rb") as file:
        file.seek(span.start)
        left = span.stop - span.start
        while block := file.read(min(BLOCK, left)):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()
