"""Checkpoints with 8-bit quantised weights.

The checkpoint stores `X.weight` as `X.weight_int8` and `X.weight_scale`.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from deepseek.errors import CheckpointError
from deepseek.kernels.int8 import GROUP, Int8Matrix, quantize

VALUES = "_int8"
SCALES = "_scale"
SMALLEST = 1 << 12  # elements; quantising smaller matrices saves nothing


def is_large(name: str, tensor: Tensor) -> bool:
    """Return whether to quantise a tensor: a large matrix whose rows divide into groups.

    Routers stay unquantised, because they decide by small differences between logits.
    """
    return (
        tensor.dim() >= 2
        and tensor.numel() >= SMALLEST
        and tensor.shape[-1] % GROUP == 0
        and ".router." not in name
    )


def rounded(tensors: dict[str, Tensor], done: Mapping[str, Int8Matrix]) -> dict[str, Tensor]:
    """Return a checkpoint's tensors with the large matrices quantised.

    Args:
        tensors: the tensors by name.
        done: matrices that are already quantised, with calibration, by name. The others are
            rounded to the nearest value.
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
    """Return a checkpoint's tensors with quantised matrices dequantised to fp32.

    Returns:
        All tensors under their plain names, and the quantised matrices by the same names.

    Raises:
        CheckpointError: the scales of a matrix are missing or have the wrong shape.
    """
    plain = {}
    matrices = {}
    for name, tensor in tensors.items():
        if name.endswith(VALUES):
            plain_name = name.removesuffix(VALUES)
            scales = tensors.get(plain_name + SCALES)
            if scales is None or scales.shape != (*tensor.shape[:-1], tensor.shape[-1] // GROUP):
                raise CheckpointError(
                    f"The checkpoint has no scales that fit {name}; quantise the model again."
                )
            matrices[plain_name] = Int8Matrix(tensor, scales, tensor.shape[-1])
            plain[plain_name] = matrices[plain_name].float()
        elif not (name.endswith(SCALES) and name.removesuffix(SCALES) + VALUES in tensors):
            plain[name] = tensor
    return plain, matrices


def keep_matrices(model: nn.Module, matrices: dict[str, Int8Matrix]) -> None:
    """Attach quantised matrices to the layers that they belong to.

    Kernels then use them as they are instead of quantising the weights a second time. The layer of
    `X.weight` gets an attribute `int8`, the pool of experts of `X.down_proj` one `down_proj_int8`.
    """
    for name, matrix in matrices.items():
        path, _, kind = name.rpartition(".")
        setattr(model.get_submodule(path), "int8" if kind == "weight" else kind + VALUES, matrix)
