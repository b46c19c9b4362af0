"""Weights with false headers are refused in one sentence; the claimed sizes are never allocated."""

import json
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_expert import save_base

from deepseek.errors import CheckpointError, ConfigError
from deepseek.model.transformer import DeepSeekModel

NORM = "norm.weight"

Header = dict[str, Any]


def end(header: Header) -> int:
    """Return the number of bytes of the tensors in a header."""
    return max(entry["data_offsets"][1] for name, entry in header.items() if name[0] != "_")


def changed(**fields: Any) -> Callable[[Header], None]:
    return lambda header: header[NORM].update(fields)


CASES: dict[str, Callable[[Header], Any]] = {
    "product of sizes overflows": changed(shape=[2**32, 2**32, 2]),
    "huge size": changed(shape=[2**40], data_offsets=[0, 2**42]),
    "negative size": changed(shape=[-32]),
    "size that is no integer": changed(shape=[32.5]),
    "no dimension is left": changed(shape=[0]),
    "offsets beyond the file": changed(data_offsets=[2**62, 2**62 + 128]),
    "offsets in reverse": changed(data_offsets=[128, 0]),
    "overlapping tensors": lambda header: header.update(copy=header[NORM]),
    "unknown dtype": changed(dtype="F33"),
    "integers in place of weights": changed(dtype="I32"),
    "half the bytes": changed(dtype="F64"),
    "a tensor is missing": lambda header: header.pop(NORM),
    "an entry is no table": lambda header: header.update({NORM: 3}),
    "a name of another model": lambda header: header.update({"x" * 10_000: header.pop(NORM)}),
}


def save_weights(folder: Path, change: Callable[[Header], Any]) -> None:
    """Change the header of a model folder's weights."""
    file = folder / "model.safetensors"
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


@pytest.mark.parametrize("name", CASES)
def test_a_header_that_lies_is_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base")
    save_weights(folder, CASES[name])
    refused_within_memory(folder)


@pytest.mark.parametrize("length", [0, 7, 2**31, 2**53, 2**63, 2**64 - 1])
def test_a_header_length_that_lies_is_refused(length: int, tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base")
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])
    refused_within_memory(folder)


def test_a_quantised_matrix_without_axes_is_refused(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base")
    file = folder / "model.safetensors"
    tensors = load_file(file) | {"embed_tokens.weight_int8": torch.tensor(1, dtype=torch.int8)}
    save_file(tensors, file)
    refused_within_memory(folder)


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1])
def test_weights_that_are_cut_short_are_refused(kept: int, tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    refused_within_memory(folder)


@pytest.mark.parametrize("layers", [5000, 10**6, 2**31 - 1, 2**40])
def test_no_model_is_built_of_millions_of_layers(layers: int, tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base")
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": layers}))
    with pytest.raises(ConfigError, match="num_hidden_layers"):
        DeepSeekModel.from_pretrained(folder)


def refused_within_memory(folder: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=r"^[^\n]+\.$") as refusal:
        DeepSeekModel.from_pretrained(folder, dtype="float32")
    assert str(refusal.value).isprintable() and len(str(refusal.value)) < 600
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "200 MB"
