"""A strict safetensors reader for untrusted pack files.

The format is an 8-byte little-endian header length, a JSON header
`{name: {dtype, shape, data_offsets}, "__metadata__": {...}}`, and the tensors' bytes. The
safetensors library accepts more than a pack needs. This reader requires every header entry to equal
the one that follows from the manifest and the preceding entries before any tensor is read
(`packs/tensors.py`). It needs no torch, so that a list of packs is quick.
"""

import json
import math
import os
import stat
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from deepseek.checkpoint.files import expanded
from deepseek.errors import PackError
from deepseek.packs.manifest import DtypeName, TensorSpec, parse_json, printable

MAX_HEADER = 1 << 20  # bytes
CODES: dict[DtypeName, str] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
ITEM_BYTES: dict[DtypeName, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
DAMAGED = "the file is damaged, fetch it again"


@dataclass(frozen=True)
class Header:
    """The parsed header of an open pack.

    Attributes:
        metadata: the `__metadata__` table.
        entries: tensor name -> its unchecked header entry.
        data_size: bytes after the header.
    """

    metadata: dict[str, str]
    entries: dict[str, Any]
    data_size: int


def open_regular(path: Path, max_bytes: int) -> BinaryIO:
    """Open a regular file for reading, without following a symbolic link or blocking on a pipe.

    Args:
        path: file to open; `~` stands for the home folder.
        max_bytes: size of the largest file to accept.

    Raises:
        ConfigError: there is no such user.
        PackError: the path is missing, is no regular file, is too large or cannot be opened.
    """
    path = expanded(path)
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise PackError("there is no such file") from None
    except (OSError, ValueError) as error:
        cause = (
            "it is a symbolic link"
            if path.is_symlink()
            else printable(getattr(error, "strerror", None) or error)
        )
        raise PackError(
            f"it cannot be opened ({cause}); give the path of the file itself"
        ) from None
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode) or status.st_size > max_bytes:
        os.close(handle)
        if stat.S_ISREG(status.st_mode):
            raise PackError(f"it has {status.st_size} bytes and the policy allows {max_bytes}")
        raise PackError("it is not a regular file; give the path of a .safetensors file")
    return os.fdopen(handle, "rb")


def read_header(file: BinaryIO) -> Header:
    """Read and check the header of `file`, and leave the file position at the first tensor.

    Raises:
        PackError: the header is truncated, too long, malformed or not safetensors.
    """
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(MAX_HEADER, size - 8):
        raise PackError(_bad_length(prefix, length))
    content = parse_json(_decode_header(file.read(length)))
    if not isinstance(content, dict):
        raise PackError(f"its header is not a table; {DAMAGED}")
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise PackError(f"its metadata is not a table of strings; {DAMAGED}")
    return Header(metadata, content, size - 8 - length)


def check_table(header: Header, specs: dict[str, TensorSpec]) -> dict[str, int]:
    """Return where each tensor begins in the bytes after the header, by name.

    Args:
        header: the header of a pack.
        specs: dtype and shape of each tensor that the manifest calls for.

    Raises:
        PackError: the header does not list exactly the tensors of `specs`, contiguously, or the
            file holds more or fewer bytes.
    """
    check_names(header.entries.keys(), specs.keys())
    offsets = {}
    end = 0
    for name, entry in header.entries.items():
        dtype, shape = specs[name]
        offsets[name] = end
        end = end + math.prod(shape) * ITEM_BYTES[dtype]
        expected_entry = {
            "dtype": CODES[dtype],
            "shape": list(shape),
            "data_offsets": [offsets[name], end],
        }
        # Compare as JSON text, in which True and 1 or 1.0 and 1 differ.
        if (
            json.dumps(entry, sort_keys=True) != json.dumps(expected_entry, sort_keys=True)
            or offsets[name] % ITEM_BYTES[dtype]
        ):
            raise PackError(
                f"its tensor {name} is ({printable(entry)}) and by its manifest should be "
                f"{expected_entry}"
            )
    if end != header.data_size:
        raise PackError(f"its tensors need {end} bytes and it holds {header.data_size}; {DAMAGED}")
    return offsets


def check_names(names: Collection[str], expected: Collection[str]) -> None:
    """Raise `PackError` unless the tensor names in a pack are exactly those of its manifest."""
    for name in sorted({*names} - {*expected}):
        raise PackError(
            f"it holds a tensor '{printable(name, 60)}' that its manifest does not call for"
        )
    for name in sorted({*expected} - {*names}):
        raise PackError(f"its tensor {name} is missing; {DAMAGED}")


def _bad_length(prefix: bytes, length: int) -> str:
    # A valid length can start with the same two bytes as such an archive. The third byte tells them
    # apart: every opcode there is "(" or above.
    pickled = prefix[:1] == b"\x80" and prefix[1:2] in b"\2\3\4\5" and prefix[2:3] >= b"("
    if pickled or prefix.startswith(b"PK"):
        return (
            "it is a zip or pickle archive under another name, which could run code; packs are "
            "safetensors files"
        )
    if len(prefix) == 8 and length > MAX_HEADER:
        return (
            f"its header claims {length} bytes and {MAX_HEADER} are allowed, so that it is hardly a "
            "safetensors file; give one that `deepseek expert train` wrote"
        )
    return f"its header is cut short; {DAMAGED}"


def _decode_header(header: bytes) -> str:
    try:
        return header.decode("utf-8")
    except UnicodeDecodeError:
        raise PackError(f"its header is not UTF-8 text; {DAMAGED}") from None
