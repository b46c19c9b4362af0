"""Finished parts of an interrupted quantisation, from which the same call resumes."""

import shutil
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from deepseek.checkpoint.store import load_state, read_json, save_state, write_json
from deepseek.kernels.int8 import Int8Matrix

Matrices = dict[str, Int8Matrix]
"""Name of a weight -> quantised matrix."""


class KeptParts:
    """The finished parts of one quantisation, kept in a folder until all of it is written.

    Args:
        folder: the folder, which belongs to one model and one setting; None: nothing is kept.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def texts(self, compute: Callable[[], Tensor]) -> Tensor:
        """Return the calibration texts, computed unless they were kept."""
        place = self._place("texts")
        if place is None:
            return compute()
        if not place.exists():
            save_state(place, {"ids": compute()}, {})
        return load_state(place)[0]["ids"]

    def names(self, compute: Callable[[], set[str]]) -> set[str]:
        """Return the names of the matrices that get 8 bits, computed unless they were kept."""
        place = self._place("names.json")
        if place is None:
            return compute()
        if not place.exists():
            write_json(place, sorted(compute()))
        return set(read_json(place))

    def layer(self, number: int, compute: Callable[[], Matrices]) -> Matrices:
        """Return the quantised matrices of a layer, computed unless they were kept."""
        place = self._place(f"layer-{number:03}")
        if place is None:
            return compute()
        if not place.exists():
            _save(place, compute())
        return _load(place)

    def remove(self) -> None:
        """Remove all that was kept."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _place(self, name: str) -> Path | None:
        if self._folder is None:
            return None
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder / name


def _save(place: Path, matrices: Matrices) -> None:
    values = {f"{name}.values": matrix.values for name, matrix in matrices.items()}
    scales = {f"{name}.scales": matrix.scales for name, matrix in matrices.items()}
    forms = {name: [matrix.width, matrix.bits] for name, matrix in matrices.items()}
    save_state(place, values | scales, forms)


def _load(place: Path) -> Matrices:
    tensors, forms = load_state(place)
    return {
        name: Int8Matrix(tensors[f"{name}.values"], tensors[f"{name}.scales"], width, bits)
        for name, (width, bits) in forms.items()
    }
