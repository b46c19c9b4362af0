"""Linear layers and embeddings whose weights stay in the checkpoint's files.

The compiled runner packs its own copy of the weights. The layers themselves are the reference: an
adapter, a text embedding or a calibration reads a matrix from its file, dequantises it if need be,
and drops it. If the model is small for the machine, matrices are kept after the first read.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from deepseek.checkpoint.stream import TensorFiles
from deepseek.device.memory import total_memory
from deepseek.errors import CheckpointError
from deepseek.kernels.int8 import Int8Matrix
from deepseek.model.embedding import ScaledEmbedding
from deepseek.model.quantised import check_scales, read_quantised, stored_bits, stored_shape

KEPT_SHARE = 1 / 8
"""Share of the machine's memory up to which the dequantised weights of a model are kept."""


class StoredMatrix:
    """A matrix `[F, D]` in a checkpoint's files.

    Args:
        files: the checkpoint.
        name: name of the matrix.
        dtype: dtype in which it is returned.
        device: device on which it is returned.

    Attributes:
        shape: its shape.
        bits: number of bits that the checkpoint stores it with; None: not quantised.
        keeps: whether it stays in memory after the first `tensor`.

    Raises:
        CheckpointError: it is neither floating point nor quantised, or its scales do not fit.
    """

    def __init__(
        self, files: TensorFiles, name: str, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.name = name
        self.shape = stored_shape(files, name)
        self.bits = stored_bits(files, name)
        self.keeps = False
        self._files = files
        self._dtype = dtype
        self._device = device
        self._tensor: Tensor | None = None
        if self.bits is not None:
            check_scales(files, name)
        elif not files.dtype(name).is_floating_point:
            raise CheckpointError(
                f"The checkpoint's tensor {name} is of dtype {files.dtype(name)}; weights must be "
                "floating-point numbers."
            )

    def rows(self, first: int, last: int) -> Tensor:
        """Return rows `first` to `last - 1`, dequantised."""
        if self._tensor is not None:
            return self._tensor[first:last]
        matrix = self.quantised(first, last)
        plain = self._files.read(self.name, first, last) if matrix is None else matrix.float()
        return plain.to(self._device, self._dtype)

    def quantised(self, first: int, last: int) -> Int8Matrix | None:
        """Return rows `first` to `last - 1` as they are stored; None if they are not quantised."""
        return read_quantised(self._files, self.name, first, last)

    def tensor(self) -> Tensor:
        """Return the whole matrix, dequantised."""
        tensor = self.rows(0, self.shape[0])
        if self.keeps:
            self._tensor = tensor
        return tensor

    def hold(self, tensor: Tensor | None) -> None:
        """Use a tensor `[F, D]` instead of the file's; None: use the file's again."""
        self._tensor = tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the dequantised matrix."""
        return self.shape[0] * self.shape[1] * self._dtype.itemsize


class StoredLinear(nn.Linear):
    """A linear layer whose weight is a stored matrix.

    Args:
        stored: the weight `[F, D]`.
        bias: the bias `[F]`, or None.
    """

    def __init__(self, stored: StoredMatrix, bias: nn.Parameter | None) -> None:
        nn.Module.__init__(self)
        self.stored = stored
        self.out_features, self.in_features = stored.shape
        self.bias = bias  # type: ignore[assignment]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight, read from its file."""
        return self.stored.tensor()


class StoredEmbedding(nn.Module):
    """An embedding whose table is a stored matrix.

    Args:
        stored: the table `[V, D]`.
        scale: factor of the rows, in the precision of the weights; None: no factor.
    """

    def __init__(self, stored: StoredMatrix, scale: float | None = None) -> None:
        super().__init__()
        self.stored = stored
        self.scale = scale

    @property
    def weight(self) -> Tensor:
        """The table, read from its file."""
        return self.stored.tensor()

    def forward(self, ids: Tensor) -> Tensor:
        """Return the embeddings `[..., D]` of tokens `[...]`."""
        rows = self._rows(ids)
        return rows if self.scale is None else rows * rows.new_tensor(self.scale)

    def _rows(self, ids: Tensor) -> Tensor:
        if self.stored.keeps:
            return embedding(ids, self.weight)
        distinct, places = ids.unique(return_inverse=True)
        rows = [self.stored.rows(token, token + 1) for token in distinct.tolist()]
        return torch.cat(rows)[places]


def stored_matrices(module: nn.Module) -> dict[str, StoredMatrix]:
    """Return the stored matrices of a module by the names of the layers, each once."""
    found: dict[str, StoredMatrix] = {}
    for name, layer in module.named_modules():
        is_stored = isinstance(layer, StoredLinear | StoredEmbedding)
        if is_stored and layer.stored not in found.values():
            found[name] = layer.stored
    return found


def store_weights(
    model: nn.Module, files: TensorFiles, dtype: torch.dtype, device: torch.device
) -> set[str]:
    """Replace the linear layers and embeddings of a model by ones that read a checkpoint.

    Args:
        model: the model, on the meta device.
        files: the checkpoint.
        dtype: dtype to compute in.
        device: device to compute on.

    Returns:
        Names of the matrices that are read when they are used.

    Raises:
        CheckpointError: a matrix has another shape than the model's.
    """
    matrices: dict[str, StoredMatrix] = {}
    tied = getattr(model, "all_tied_weights_keys", {})
    for path, module in list(model.named_modules()):
        name = f"{path}.weight"
        source = tied.get(name, name)
        is_layer = type(module) in (nn.Linear, nn.Embedding, ScaledEmbedding)
        if not is_layer or (stored_bits(files, source) is None and source not in files):
            continue
        if source not in matrices:
            matrices[source] = StoredMatrix(files, source, dtype, device)
        _replace(model, path, module, matrices[source])
    limit = KEPT_SHARE * total_memory()
    keeps = sum(matrix.nbytes for matrix in matrices.values()) <= limit
    for matrix in matrices.values():
        matrix.keeps = keeps
    return set(matrices)


def _replace(model: nn.Module, path: str, module: Any, stored: StoredMatrix) -> None:
    """Replace a layer by one with a stored weight."""
    if stored.shape != tuple(module.weight.shape):
        raise CheckpointError(
            f"The checkpoint's tensors do not fit its config.json: {stored.name} has the shape "
            f"{list(stored.shape)} in place of {list(module.weight.shape)}."
        )
    if isinstance(module, nn.Linear):
        layer: nn.Module = StoredLinear(stored, module.bias)
    elif isinstance(module, ScaledEmbedding):
        layer = StoredEmbedding(stored, math.sqrt(stored.shape[1]))
    else:
        layer = StoredEmbedding(stored)
    parent, _, attribute = path.rpartition(".")
    setattr(model.get_submodule(parent), attribute, layer)
