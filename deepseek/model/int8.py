"""Checkpoints whose matrices are 8-bit integers: `X.weight` lies there as `X.weight_int8` and
`X.weight_scale`.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from deepseek.errors import CheckpointError
from deepseek.kernels.int8 import GROUP, Int8Matrix, quantize

VALUES = "_int8"
SCALES = "_scale"
SMALLEST = 1 << 12  # numbers of a matrix that is worth rounding


def is_large(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is a matrix to round: of whole groups, and no router, which decides by small
    differences.
    """
    return (
        tensor.dim() >= 2
        and tensor.numel() >= SMALLEST
        and tensor.shape[-1] % GROUP == 0
        and ".router." not in name
    )


def rounded(tensors: dict[str, Tensor], done: Mapping[str, Int8Matrix]) -> dict[str, Tensor]:
    """Return a checkpoint's tensors with the large matrices rounded, those that are not `done` to
    the nearest.
    """
    output = {}
    for name, tensor in tensors.items():
        if is_large(name, tensor):
            matrix = done[name] if name in done else quantize(tensor)
            output[name + VALUES] = matrix.values
            output[name + SCALES] = matrix.scales
        else:
            output[name] = tensor
    return output


def restored(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Int8Matrix]]:
    """Return tensors with their rounded matrices as fp32, and those matrices by name. Others pass
    through.

    Raises:
        CheckpointError: a matrix lacks its scales, or they do not fit.
    """
    plain = {}
    matrices = {}
    for name, tensor in tensors.items():
        if name.endswith(VALUES):
            own = name.removesuffix(VALUES)
            scales = tensors.get(own + SCALES)
            if scales is None or scales.shape != (*tensor.shape[:-1], tensor.shape[-1] // GROUP):
                raise CheckpointError(
                    f"The checkpoint has no scales that fit {name}; quantise the model again."
                )
            matrices[own] = Int8Matrix(tensor, scales, tensor.shape[-1])
            plain[own] = matrices[own].float()
        elif not (name.endswith(SCALES) and name.removesuffix(SCALES) + VALUES in tensors):
            plain[name] = tensor
    return plain, matrices


def keep_matrices(model: nn.Module, matrices: dict[str, Int8Matrix]) -> None:
    """Hang rounded matrices on the layers whose weights came from them, so that a kernel need not
    round again.
    """
    for name, matrix in matrices.items():
        path, _, kind = name.rpartition(".")
        if kind == "weight":
            model.get_submodule(path).int8 = matrix  # type: ignore[assignment]
