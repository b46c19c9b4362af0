"""The size of a served model, for clients that list models with it."""

import math
from dataclasses import dataclass

from deepseek.compiled.runner import CompiledRunner
from deepseek.engine.engine import Engine
from deepseek.engine.memory import SCALE_BITS
from deepseek.model.quantised import is_large
from deepseek.model.stored import stored_matrices


@dataclass(frozen=True)
class ModelSize:
    """Size of a base model.

    Attributes:
        parameters: number of its weights.
        nbytes: memory of the weights in bytes, in the precision that the engine uses.
        precision: type of its matrices: "int8" or "int4" if they are quantised, else their dtype,
            such as "bfloat16".
    """

    parameters: int
    nbytes: int
    precision: str


def model_size(engine: Engine) -> ModelSize:
    """Return the size of an engine's base model.

    Matrices count wherever they are: those that the compiled runner packs can have stayed in the
    checkpoint's files.

    Args:
        engine: the engine.
    """
    model = engine.model
    is_packed = isinstance(engine.runner, CompiledRunner)
    parameters = 0
    bits = 0.0
    for name, weight in model.named_parameters():
        is_quantised = is_packed and is_large(name, tuple(weight.shape))
        parameters += weight.numel()
        bits += weight.numel() * (8 + SCALE_BITS if is_quantised else 8 * weight.itemsize)
    lowest = 8
    for matrix in stored_matrices(model).values():
        quantised_bits = matrix.bits or (8 if is_packed else None)
        elements = math.prod(matrix.shape)
        parameters += elements
        bits += elements * (
            quantised_bits + SCALE_BITS if quantised_bits else 8 * model.dtype.itemsize
        )
        lowest = min(lowest, matrix.bits or 8)
    precision = f"int{lowest}" if is_packed else str(model.dtype).removeprefix("torch.")
    return ModelSize(parameters, int(bits / 8), precision)
