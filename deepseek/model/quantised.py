"""Checkpoints with quantised weights.

The checkpoint stores `X.weight` as `X.weight_scale` and `X.weight_int8` or, with two values per
byte, `X.weight_int4`.
"""

import math
from collections import Counter
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from deepseek.checkpoint.fingerprint import weight_files
from deepseek.checkpoint.stream import headers
from deepseek.errors import CheckpointError
from deepseek.kernels.int8 import BLOCK_ELEMENTS, Int8Matrix, from_nibbles, quantize, to_nibbles
from deepseek.kernels.int8_layout import GROUP

SUFFIXES = {8: "_int8", 4: "_int4"}
"""Number of bits -> suffix of the name of a matrix."""

SCALES = "_scale"
SMALLEST = 1 << 12  # elements; quantising smaller matrices saves nothing


class Tensors(Protocol):
    """The tensors of a checkpoint by name, in memory or in its files."""

    def __contains__(self, name: str) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        ...

    def read(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Return a tensor, or its rows `first` to `last - 1`."""
        ...


class LoadedTensors:
    """Tensors in memory.

    Args:
        tensors: the tensors by name.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        tensor = self._tensors[name]
        return tensor if last is None and not first else tensor[first:last]


def is_large(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether to quantise a tensor: a large matrix whose rows divide into groups.

    Routers stay unquantised, because they decide by small differences between logits.
    """
    return (
        len(shape) >= 2
        and math.prod(shape) >= SMALLEST
        and shape[-1] % GROUP == 0
        and ".router." not in name
    )


def stored_bits(tensors: Tensors, name: str) -> int | None:
    """Return the number of bits that a checkpoint stores a matrix with; None: not quantised."""
    for bits, suffix in SUFFIXES.items():
        if name + suffix in tensors:
            return bits
    return None


def bits_of_layers(folder: Path) -> int | None:
    """Return the bits of most weights in the layers of a model folder; None: not quantised.

    Routed experts, which have 8 bits in every quantised model, do not count.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    weights: Counter[int | None] = Counter()
    for header in chain.from_iterable(map(headers, weight_files(folder))):
        if "layers." not in header.name or len(header.shape) != 2:
            continue
        bits = next((bits for bits, end in SUFFIXES.items() if header.name.endswith(end)), None)
        weights[bits] += header.elements * 8 // (bits or 8)
    return weights.most_common(1)[0][0] if weights else None


def stored_shape(tensors: Tensors, name: str) -> tuple[int, ...]:
    """Return the shape of a tensor of a checkpoint, whether quantised or not."""
    bits = stored_bits(tensors, name)
    shape = tensors.shape(name if bits is None else name + SUFFIXES[bits])
    if bits is None or not shape:
        return shape
    *rows, width = shape
    return (*rows, width * 8 // bits)


def read_quantised(
    tensors: Tensors, name: str, first: int = 0, last: int | None = None
) -> Int8Matrix | None:
    """Return rows of a quantised matrix of a checkpoint; None if it is not quantised.

    Raises:
        CheckpointError: the scales of the matrix are missing, or have the wrong shape or dtype.
    """
    bits = stored_bits(tensors, name)
    if bits is None:
        return None
    check_scales(tensors, name)
    values = tensors.read(name + SUFFIXES[bits], first, last)
    scales = tensors.read(name + SCALES, first, last)
    if values.element_size() != 1 or not scales.is_floating_point():
        raise CheckpointError(
            f"The checkpoint's numbers of {name} have the dtypes {values.dtype} and "
            f"{scales.dtype}; quantise the model again."
        )
    if bits == 4:
        values = from_nibbles(values)
    return Int8Matrix(values, scales.bfloat16(), values.shape[-1], bits)


def check_scales(tensors: Tensors, name: str) -> None:
    """Check that a quantised matrix has scales that fit it.

    Raises:
        CheckpointError: the scales are missing or have the wrong shape.
    """
    *rows, width = stored_shape(tensors, name) or (1,)  # a scalar is refused as one column
    if (
        name + SCALES not in tensors
        or width % GROUP
        or tensors.shape(name + SCALES) != (*rows, width // GROUP)
    ):
        raise CheckpointError(
            f"The checkpoint has no scales that fit {name}; quantise the model again."
        )


def stored_form(name: str, matrix: Int8Matrix) -> dict[str, Tensor]:
    """Return the tensors that a checkpoint stores for a quantised matrix."""
    values = to_nibbles(matrix.values) if matrix.bits == 4 else matrix.values
    return {name + SUFFIXES[matrix.bits]: values, name + SCALES: matrix.scales}


def with_large_quantised(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a checkpoint's tensors with the large matrices quantised to the nearest 8-bit values.

    Args:
        tensors: the tensors by name.
    """
    output: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if is_large(name, tuple(tensor.shape)):
            output |= stored_form(name, quantize(tensor))
        else:
            output[name] = tensor
    return output


def plain_name(tensors: Tensors, name: str) -> str | None:
    """Return the name of the matrix that a stored tensor belongs to; None for scales."""
    for suffix in SUFFIXES.values():
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    is_scale = name.endswith(SCALES) and stored_bits(tensors, name.removesuffix(SCALES))
    return None if is_scale else name


def restored(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Int8Matrix]]:
    """Return a checkpoint's tensors with quantised matrices dequantised to fp32.

    Returns:
        All tensors under their plain names, and the quantised matrices by the same names.

    Raises:
        CheckpointError: the scales of a matrix are missing or have the wrong shape.
    """
    loaded = LoadedTensors(tensors)
    plain = {}
    matrices = {}
    for name, tensor in tensors.items():
        weight_name = plain_name(loaded, name)
        if weight_name is None:
            continue
        matrix = read_quantised(loaded, weight_name)
        if matrix is None:
            plain[weight_name] = tensor
        else:
            matrices[weight_name] = matrix
            plain[weight_name] = matrix.float()
    return plain, matrices


def keep_matrices(model: nn.Module, matrices: dict[str, Int8Matrix]) -> None:
    """Attach quantised matrices to the layers that they belong to.

    Kernels then use them as they are instead of quantising the weights a second time (see
    `kept_matrix`).
    """
    for name, matrix in matrices.items():
        path, _, parameter = name.rpartition(".")
        setattr(model.get_submodule(path), _kept_name(parameter), matrix)


def kept_matrix(module: nn.Module, parameter: str, expert: int | None = None) -> Int8Matrix | None:
    """Return the quantised matrix that a weight was restored from (`keep_matrices`).

    Args:
        module: a layer or a pool of experts.
        parameter: name of the weight.
        expert: index of an expert of a pool; None: the whole weight.

    Returns:
        The matrix; None if there is none, or the weight has changed since, for example by training
        or by merging an adapter.
    """
    matrix = getattr(module, _kept_name(parameter), None)
    if not isinstance(matrix, Int8Matrix):
        return None
    weight = getattr(module, parameter)
    if expert is not None:
        weight = weight[expert]
        values, scales = matrix.values[expert], matrix.scales[expert]
        matrix = Int8Matrix(values, scales, matrix.width, matrix.bits)
    return matrix if _restores(matrix, weight.detach()) else None


def _kept_name(parameter: str) -> str:
    """Return the name of the attribute that holds the matrix of a parameter."""
    return "int8" if parameter == "weight" else f"{parameter}_int8"


def _restores(matrix: Int8Matrix, weight_FD: Tensor) -> bool:
    """Return whether a weight equals a quantised matrix, dequantised to the weight's dtype."""
    if len(weight_FD) != len(matrix.values) or weight_FD.shape[1] != matrix.width:
        return False
    rows = max(1, BLOCK_ELEMENTS // matrix.width)
    return all(
        torch.equal(
            matrix.rows(first, first + rows).float().to(weight_FD.dtype),
            weight_FD[first : first + rows].cpu(),
        )
        for first in range(0, len(weight_FD), rows)
    )
