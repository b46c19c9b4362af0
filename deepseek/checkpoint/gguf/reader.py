"""Read a GGUF file: its metadata, the table of its tensors, and their values.

`gguf.GGUFReader` trusts every count in the file (a hostile length keeps it busy forever) and takes
minutes for a vocabulary of 262,144 entries. This reader checks each length against the file's size
before it uses it. The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Never

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from deepseek.errors import CheckpointError, shown

MAGIC = b"GGUF"
VERSIONS = (2, 3)
NUMBERS = dict(enumerate("BbHhIif?")) | dict(zip((10, 11, 12), "Qqd", strict=True))
"""Metadata type -> its code in `struct`."""
STRING = 8
ARRAY = 9
LONGEST_ARRAY = 1 << 24
LONGEST_STRING = 1 << 26
MOST_AXES = 4
NO_TOKEN = (-1, 2**32 - 1)
"""What llama.cpp writes as the id of a token that a vocabulary lacks, signed and unsigned."""
CHUNK = 1 << 20
"""Values that are dequantised at once: the intermediate results are several times as large."""

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies in the file.

    Attributes:
        shape: axes in PyTorch's order (GGUF counts from the last one).
        kind: how the values are encoded.
        start: first byte in the file.
        num_bytes: length in bytes.
    """

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int
    num_bytes: int


@dataclass(frozen=True)
class GgufFile:
    """Content of a GGUF file; values of tensors are read when they are asked for.

    Attributes:
        path: the file.
        facts: metadata by key, such as "general.architecture"; arrays are lists.
        tensors: tensors by GGUF name, such as "blk.0.attn_q.weight", in the file's order.
    """

    path: Path
    facts: dict[str, Any]
    tensors: dict[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """The model's architecture in llama.cpp's words, such as "llama"."""
        return str(self.facts["general.architecture"])

    def fact(self, key: str) -> Any:
        """Return the metadata under `key`; raise `CheckpointError` if there is none."""
        try:
            return self.facts[key]
        except KeyError:
            raise CheckpointError(
                f"{self.path} has no metadata {key!r}; convert the original model to GGUF again."
            ) from None

    def token_id(self, role: str) -> int | None:
        """Return the id of the token of a role, such as "eos"; None if there is none.

        Raises:
            CheckpointError: the vocabulary has no token of this id.
        """
        key = f"tokenizer.ggml.{role}_token_id"
        token = self.facts.get(key)
        if token is None or token in NO_TOKEN:
            return None
        size = len(self.fact("tokenizer.ggml.tokens"))
        if type(token) is not int or not 0 <= token < size:
            raise CheckpointError(
                f"{self.path} states {key} = {shown(token)} for a vocabulary of {size} tokens; "
                "convert the original model to GGUF again."
            )
        return token

    def values(self, name: str) -> Floats:
        """Return a tensor dequantised to fp32, `CHUNK` values at a time.

        Raises:
            CheckpointError: the `gguf` package does not dequantise this encoding.
        """
        tensor = self.tensors[name]
        block, block_bytes = GGML_QUANT_SIZES[tensor.kind]
        blocks = np.memmap(self.path, np.uint8, "r", tensor.start, (tensor.num_bytes,))
        output = np.empty(prod(tensor.shape), np.float32)
        step = CHUNK // block
        for first in range(0, len(output) // block, step):
            part = blocks[first * block_bytes : (first + step) * block_bytes]
            try:
                with np.errstate(all="ignore"):
                    output[first * block : (first + step) * block] = dequantize(part, tensor.kind)
            except NotImplementedError:  # what the gguf package raises for such an encoding
                raise CheckpointError(
                    f"{self.path} holds {name} as {tensor.kind.name}, which the gguf package does "
                    "not dequantise; take a file of another quantisation."
                ) from None
        return output.reshape(tensor.shape)


def read_gguf(path: str | Path) -> GgufFile:
    """Read the metadata and the table of tensors of a GGUF file.

    Args:
        path: the file.

    Raises:
        CheckpointError: it is no GGUF file, of another version, truncated or damaged.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise CheckpointError(
            f"{path} cannot be read ({error}); give the path of a GGUF file."
        ) from None
    with content:
        return _Parser(path, content).parse()


class _Parser:
    """Reads a GGUF header from its bytes, front to back."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self.path = path
        self.content = content
        self.position = 0

    def parse(self) -> GgufFile:
        if self.take(4) != MAGIC:
            raise CheckpointError(f"{self.path} is not a GGUF file: it does not begin with 'GGUF'.")
        version = self.number("I")
        if version not in VERSIONS:
            raise CheckpointError(
                f"{self.path} is GGUF of version {version} or of another byte order; only versions "
                "2 and 3, little-endian, are read."
            )
        num_tensors = self.number("Q")
        num_facts = self.number("Q")
        facts = self.table(num_facts, lambda: self.value(self.number("I")))
        if not isinstance(facts.get("general.architecture"), str):
            self.fail("it names no architecture")
        entries = self.table(num_tensors, self.entry)
        alignment = facts.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            self.fail(f"its alignment is {alignment!r}")
        start = -(-self.position // alignment) * alignment
        tensors = {name: self.place(name, start, *entry) for name, entry in entries.items()}
        return GgufFile(self.path, facts, tensors)

    def table(self, count: int, read: Callable[[], Any]) -> dict[str, Any]:
        """Read `count` named entries."""
        entries: dict[str, Any] = {}
        for _ in range(count):
            name = self.string()
            if name in entries:
                self.fail(f"{name!r} is there twice")
            entries[name] = read()
        return entries

    def value(self, kind: int) -> Any:
        """Read one metadata value of a type."""
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.number(self.number_type(kind))
        element = self.number("I")
        count = self.number("Q")
        if count > LONGEST_ARRAY:
            self.fail(f"it has a list of {count} entries")
        if element == STRING:
            return [self.string() for _ in range(count)]
        code = f"<{count}{self.number_type(element)}"
        return list(struct.unpack(code, self.take(struct.calcsize(code))))

    def number_type(self, kind: int) -> str:
        if kind not in NUMBERS:
            self.fail(f"it has metadata of the unknown type {kind}")
        return NUMBERS[kind]

    def entry(self) -> tuple[tuple[int, ...], int, int]:
        """Read shape, encoding and offset of a tensor."""
        axes = self.number("I")
        if not 1 <= axes <= MOST_AXES:
            self.fail(f"it has a tensor of {axes} axes")
        shape = tuple(self.number("Q") for _ in range(axes))[::-1]
        return shape, self.number("I"), self.number("Q")

    def place(
        self, name: str, start: int, shape: tuple[int, ...], kind: int, offset: int
    ) -> GgufTensor:
        """Return a tensor after checking that all its bytes are in the file."""
        try:
            encoding = GGMLQuantizationType(kind)
            block, block_bytes = GGML_QUANT_SIZES[encoding]
        except (ValueError, KeyError):
            raise CheckpointError(
                f"{self.path} holds {name!r} in the unknown encoding {kind}; take a file of "
                "another quantisation, or a newer gguf package."
            ) from None
        if not all(shape) or shape[-1] % block:
            self.fail(f"{name!r} has the impossible shape {list(shape)}")
        num_bytes = prod(shape) // block * block_bytes
        if start + offset + num_bytes > len(self.content):
            self.fail(f"the file ends before {name!r} does")
        return GgufTensor(shape, encoding, start + offset, num_bytes)

    def string(self) -> str:
        length = self.number("Q")
        if length > LONGEST_STRING:
            self.fail(f"it has a text of {length} bytes")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            self.fail("a text in it is not UTF-8")

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes."""
        stop = self.position + count
        if stop > len(self.content):
            self.fail("the file ends too early")
        part = self.content[self.position : stop]
        self.position = stop
        return part

    def fail(self, reason: str) -> Never:
        raise CheckpointError(
            f"{self.path} is damaged or cut off ({reason}); download or convert it again."
        )
