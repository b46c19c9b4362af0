"""Fingerprint of a base model: a digest of its weights and a digest of its tokenizer.

An expert pack identifies its base model by these digests. They depend on values only, not on the
number of shards, their order, file names or metadata.
"""

import hashlib
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from deepseek.checkpoint.store import (
    canonical_json,
    file_digest,
    home,
    read_json,
    read_object,
    write_json,
)
from deepseek.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
SHARD_INDEX = "model.safetensors.index.json"

SHARD = re.compile(r"(.*-)(\d{5})-of-(\d{5})(\.safetensors)")
"""Name of a shard, as `save_pretrained` writes it."""


@dataclass(frozen=True)
class Fingerprint:
    """SHA-256 digests of a model in hexadecimal.

    Attributes:
        weights: digest of the weights.
        tokenizer: digest of the tokenizer; "" without a tokenizer.json.
    """

    weights: str
    tokenizer: str


def weight_files(folder: str | Path) -> list[Path]:
    """Return the safetensors files of a model folder.

    Some folders hold weights twice. As `transformers` does, `model.safetensors` is taken before
    the shards of an index, and those before any other safetensors files.

    Raises:
        CheckpointError: there are no weights, or a shard is missing.
    """
    folder = Path(folder)
    present = {path.name for path in folder.glob("*") if path.is_file()}
    files = [folder / name for name in weight_names(present, folder)]
    if not files:
        raise CheckpointError(
            f"{folder} holds no .safetensors weights; save the model with save_pretrained first."
        )
    for file in [*files, *_other_shards(files)]:
        if not file.is_file():
            raise CheckpointError(
                f"{file} is missing though the other shards or their index name it; download the "
                "model again."
            )
    return files


def weight_names(names: Collection[str], folder: Path) -> list[str]:
    """Return those names of a model's files that hold its weights, by `weight_files`' rule.

    Args:
        names: the names of all files, relative to the model's folder; those in subfolders, such as
            copies of the weights in another format, are left out.
        folder: where the index of the shards is read, if there is one.

    Raises:
        CheckpointError: the index is invalid.
    """
    index = folder / SHARD_INDEX
    if SINGLE_FILE in names:
        return [SINGLE_FILE]
    if index.is_file():
        return _shards(index)
    return sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)


def _other_shards(files: Iterable[Path]) -> Iterator[Path]:
    """Yield the paths of all shards that the names of files count, as in
    `model-00001-of-00009.safetensors`: an interrupted download may not have the index yet.
    """
    for file in files:
        if match := SHARD.fullmatch(file.name):
            begin, number, count, end = match.groups()
            if number == "00001":
                for other_number in range(2, int(count) + 1):
                    yield file.with_name(f"{begin}{other_number:05}-of-{count}{end}")
            else:
                yield file.with_name(f"{begin}00001-of-{count}{end}")


def fingerprint(folder: str | Path) -> Fingerprint:
    """Return the fingerprint of a model folder.

    The result is cached on disk if that can be written. The cache key covers path, inode, size and
    the times of modification and change of the files.

    Raises:
        CheckpointError: a file is missing or malformed.
    """
    folder = Path(folder)
    files = weight_files(folder)
    tokenizer = folder / "tokenizer.json"
    sources = [*files, tokenizer] if tokenizer.is_file() else files
    digests = _cached_digests(
        sources,
        ("weights", "tokenizer"),
        lambda: {
            "weights": weights_digest(files),
            "tokenizer": tokenizer_digest(tokenizer) if tokenizer.is_file() else "",
        },
    )
    return Fingerprint(**digests)


def cached_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal, cached as a fingerprint is."""
    return _cached_digests([path], ("sha256",), lambda: {"sha256": file_digest(path)})["sha256"]


def _cached_digests(
    sources: list[Path], names: tuple[str, ...], compute: Callable[[], dict[str, str]]
) -> dict[str, str]:
    """Return digests of files by name, computed again only if the state of one has changed."""
    states = [_state(file) for file in sources]
    cache_key = hashlib.sha256(canonical_json(states)).hexdigest()
    cache_file = home() / "fingerprints" / f"{cache_key}.json"
    with suppress(CheckpointError):  # a damaged cache is rewritten
        entries = read_object(cache_file)
        if entries.keys() == {*names} and all(
            isinstance(digest, str) for digest in entries.values()
        ):
            return entries
    digests = compute()
    with suppress(OSError):  # a home that is full or read-only
        write_json(cache_file, digests)
    return digests


def _state(file: Path) -> tuple[str, int, int, int, int]:
    """Return a file's path (in hexadecimal, as it may not be UTF-8), inode, bytes, and times of
    modification and change in ns. A copy may keep size and modification time.
    """
    status = file.stat()
    path = os.fsencode(file.resolve()).hex()
    return path, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def weights_digest(files: list[Path]) -> str:
    """Return the SHA-256 over the tensors in safetensors files.

    It covers the sorted list of name, dtype, shape and SHA-256 of the bytes of every tensor.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        table = pool.map(_tensor_digest, each_tensor(files))
        return hashlib.sha256(canonical_json(sorted(table))).hexdigest()


def each_tensor(files: list[Path]) -> Iterator[tuple[str, str, Any]]:
    """Yield name, dtype as spelled in the file, and memory-mapped tensor of every weight.

    Raises:
        CheckpointError: a file is damaged.
    """
    for path in files:
        try:
            with safe_open(path, framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118 - safe_open is not a mapping
                    yield name, weights.get_slice(name).get_dtype(), weights.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(
                f"{path} is damaged ({error}); download the model again."
            ) from None


def tokenizer_digest(path: Path) -> str:
    """Return the SHA-256 over vocabulary, merges and added tokens of a tokenizer.json.

    Raises:
        CheckpointError: the file is not a tokenizer file.
    """
    content = read_json(path)
    try:
        model = content["model"]
        # Older files write a merge as "a b", newer ones as ["a", "b"].
        merges = [m.split(" ") if isinstance(m, str) else m for m in model.get("merges") or ()]
        added_tokens = sorted(
            (t["id"], t["content"], bool(t["special"])) for t in content.get("added_tokens") or ()
        )
        return hashlib.sha256(canonical_json([model["vocab"], merges, added_tokens])).hexdigest()
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not a tokenizer file; download the model again."
        ) from error


def _shards(index: Path) -> list[str]:
    """Return the shard names of an index.

    Only plain file names are accepted, so that an index cannot point outside its folder.
    """
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    names = (
        sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
    )
    if not names or any(Path(name).name != name for name in names):
        raise CheckpointError(f"{index} is not a valid shard index; download the model again.")
    return names


def _tensor_digest(entry: tuple[str, str, Any]) -> tuple[str, str, list[int], str]:
    """Return name, dtype, shape and digest of a tensor."""
    import torch  # here, because the import takes seconds and `deepseek pull` may not need it

    name, dtype, tensor = entry
    return (
        name,
        dtype,
        [*tensor.shape],
        hashlib.sha256(tensor.flatten().view(torch.uint8).numpy()).hexdigest(),
    )
