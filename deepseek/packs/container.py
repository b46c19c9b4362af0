"""A strict reader of one safetensors file.

The format: 8 bytes little-endian header length, a JSON header `{name: {dtype, shape, data_offsets}, "__metadata__":
{...}}`, then the tensors' bytes. The library that reads it for everyone else accepts more than a pack needs; here the
header must list exactly the tensors that the manifest calls for, back to back, before a byte of them is read.
"""

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from deepseek.errors import PackError
from deepseek.packs.manifest import TensorSpec, parse_json, printable

MAX_HEADER = 1 << 20  # bytes
CODES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DAMAGED = "the file is damaged, fetch it again"


@dataclass(frozen=True)
class Span:
    """Where a tensor lies in the data part, in bytes, and how to read it."""

    spec: TensorSpec
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """The parsed header of an open pack: metadata, and tensors in the order of their bytes."""

    metadata: dict[str, str]
    spans: dict[str, Span]
    data_size: int


def open_regular(path: Path, max_bytes: int) -> BinaryIO:
    """Open a regular file that is not a symbolic link; never blocks on a pipe. Raises `PackError`."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise PackError("there is no such file") from None
    except (OSError, ValueError) as error:
        cause = "it is a symbolic link" if path.is_symlink() else printable(getattr(error, "strerror", None) or error)
        raise PackError(f"it cannot be opened ({cause}); give the path of the file itself") from None
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode) or status.st_size > max_bytes:
        os.close(handle)
        if stat.S_ISREG(status.st_mode):
            raise PackError(f"it has {status.st_size} bytes and the policy allows {max_bytes}")
        raise PackError("it is not a regular file; give the path of a .safetensors file")
    return os.fdopen(handle, "rb")


def read_header(file: BinaryIO) -> Header:
    """Read and check the header of `file`, and leave `file` at its first tensor. Raises `PackError`."""
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(MAX_HEADER, size - 8):
        raise PackError(_bad_length(prefix, length))
    content = parse_json(_text(file.read(length)))
    if not isinstance(content, dict):
        raise PackError(f"its header is not a table; {DAMAGED}")
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise PackError(f"its metadata is not a table of strings; {DAMAGED}")
    spans = {name: _span(name, entry) for name, entry in content.items()}
    return Header(metadata, _in_order(spans, size - 8 - length), size - 8 - length)


def read_tensors(file: BinaryIO, header: Header) -> dict[str, Tensor]:
    """Read the data part and return its tensors, which share one buffer. Raises `PackError` if it is cut short."""
    data = bytearray(header.data_size)
    if file.readinto(data) != header.data_size:  # type: ignore[attr-defined]
        raise PackError(f"it changed while it was read; {DAMAGED}")
    return {
        name: torch.frombuffer(
            data, dtype=span.spec.dtype, offset=span.start, count=(span.stop - span.start) // span.spec.dtype.itemsize
        ).view(span.spec.shape)
        for name, span in header.spans.items()
    }


def check_tensors(found: dict[str, TensorSpec], expected: dict[str, TensorSpec]) -> None:
    """Raise `PackError` unless names, dtypes and shapes are exactly those of the manifest."""
    for name in sorted(found.keys() - expected.keys()):
        raise PackError(f"it holds a tensor '{printable(name, 60)}' that its manifest does not call for")
    for name, spec in expected.items():
        if name not in found:
            raise PackError(f"its tensor {name} is missing; {DAMAGED}")
        if found[name].dtype != spec.dtype:
            raise PackError(f"its tensor {name} is {found[name].dtype} and the manifest says {spec.dtype}")
        if found[name].shape != spec.shape:
            shape = printable(list(found[name].shape), 60)
            raise PackError(f"its tensor {name} has shape {shape} and the manifest says {list(spec.shape)}")


def _bad_length(prefix: bytes, length: int) -> str:
    if prefix.startswith((b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return "it is a zip or pickle archive under another name, which could run code; packs are safetensors files"
    if len(prefix) == 8 and length > MAX_HEADER:
        return f"its header claims {length} bytes and {MAX_HEADER} are allowed"
    return f"its header is cut short; {DAMAGED}"


def _text(header: bytes) -> str:
    try:
        return header.decode("utf-8")
    except UnicodeDecodeError:
        raise PackError(f"its header is not UTF-8 text; {DAMAGED}") from None


def _span(name: str, entry: Any) -> Span:
    """Return one header entry as a `Span` whose length fits its dtype and shape."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise PackError(f"its header entry '{printable(name, 60)}' is malformed; {DAMAGED}")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in CODES:
        raise PackError(f"a tensor has dtype '{printable(code, 20)}' and only {', '.join(CODES)} are allowed")
    if not _naturals(shape) or not 1 <= len(shape) <= 4 or not _naturals(offsets) or len(offsets) != 2:
        raise PackError(f"the shape or offsets of '{printable(name, 60)}' are not natural numbers; {DAMAGED}")
    spec, (start, stop) = TensorSpec(CODES[code], tuple(shape)), offsets
    size = spec.dtype.itemsize
    for extent in shape:
        size *= extent
    if stop - start != size or start % spec.dtype.itemsize:
        raise PackError(f"the offsets of '{printable(name, 60)}' do not fit its shape; {DAMAGED}")
    return Span(spec, start, stop)


def _naturals(values: Any) -> bool:
    # bool is an int to Python; the bound keeps products small.
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 40 for value in values)


def _in_order(spans: dict[str, Span], data_size: int) -> dict[str, Span]:
    """Return the spans sorted by offset; raises `PackError` on an overlap, a gap, or a wrong total."""
    ordered = dict(sorted(spans.items(), key=lambda item: (item[1].start, item[1].stop)))
    end = 0
    for name, span in ordered.items():
        if span.start != end:
            kind = "overlaps the tensor before it" if span.start < end else "leaves a gap before it"
            raise PackError(f"its tensor '{printable(name, 60)}' {kind}; {DAMAGED}")
        end = span.stop
    if end != data_size:
        raise PackError(f"its tensors need {end} bytes and it holds {data_size}; {DAMAGED}")
    return ordered
