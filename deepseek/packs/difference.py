"""Compare two packs: their manifests, and their tensors one by one."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepseek.packs.pack import ExpertPack


@dataclass(frozen=True)
class TensorDifference:
    """How one tensor differs.

    Attributes:
        name: name of the tensor.
        relative: norm of the difference over the norm of the first; 0: equal values of different
            dtypes. None: it is only in one of the packs, or has another shape.
        cosine: cosine similarity of the two, flattened; None as above.
    """

    name: str
    relative: float | None
    cosine: float | None


@dataclass(frozen=True)
class PackDifference:
    """Differences between two packs.

    Attributes:
        fields: fields of the manifests that differ -> both values.
        tensors: the tensors that differ, by name.
        equal_tensors: number of tensors that are equal, bit for bit.
    """

    fields: dict[str, tuple[Any, Any]]
    tensors: list[TensorDifference]
    equal_tensors: int


def difference(first: ExpertPack, second: ExpertPack) -> PackDifference:
    """Return the differences between two packs.

    Args:
        first, second: the packs.
    """
    before = leaves(first.manifest.model_dump(mode="json"))
    after = leaves(second.manifest.model_dump(mode="json"))
    fields = {
        name: (before.get(name), after.get(name))
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    }
    changes: list[TensorDifference] = []
    names = sorted({*first.tensors, *second.tensors})
    for name in names:
        a = first.tensors.get(name)
        b = second.tensors.get(name)
        if a is None or b is None or a.shape != b.shape:
            changes.append(TensorDifference(name, None, None))
        elif a.dtype != b.dtype or not torch.equal(a, b):
            changes.append(compare_tensors(name, a, b))
    return PackDifference(fields, changes, len(names) - len(changes))


def compare_tensors(name: str, first: Tensor, second: Tensor) -> TensorDifference:
    """Return how far two tensors of one shape are apart."""
    a = first.double().flatten()
    b = second.double().flatten()
    norm = float(a.norm())
    distance = float((a - b).norm())
    relative = distance / norm if norm else float(distance > 0)
    cosine = float(torch.nn.functional.cosine_similarity(a, b, dim=0))
    return TensorDifference(name, relative, cosine)


def leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return the values in nested JSON objects by their paths, such as `base.name`."""
    if not isinstance(value, dict):
        return {prefix: value}
    values: dict[str, Any] = {}
    for name, part in value.items():
        values |= leaves(part, f"{prefix}.{name}" if prefix else name)
    return values
