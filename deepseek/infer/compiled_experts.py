"""Plugged experts as the compiled step wants them: rounded, packed, and listed for the sequences of a batch."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from deepseek.infer.compiled_state import aligned
from deepseek.kernels.int8 import GROUP, pack, quantize, row_bytes
from deepseek.kernels.launch import placed
from deepseek.model.experts.armed import Roster
from deepseek.model.experts.module import ExpertModule


class PackedLayer(NamedTuple):
    """An expert at one layer: packed projections, groups of 64 hidden values, and its gate `[2, D + 1]`."""

    gate_up: np.ndarray
    down: np.ndarray
    inner: int
    gate: np.ndarray


def in_place(*arrays: np.ndarray) -> list[np.ndarray]:
    """Return copies of packed matrices one behind the other in one stretch of memory."""
    memory = aligned(sum(array.nbytes for array in arrays))
    copies, at = [], 0
    for array in arrays:
        copies.append(memory[at : at + array.nbytes])
        copies[-1][:] = array.reshape(-1)
        at += array.nbytes
    return copies


Packed = dict[int, PackedLayer]
"""The layers of an expert."""


def pack_module(module: ExpertModule) -> Packed:
    """Round and pack every layer of an expert."""
    packed = {}
    for layer in module.layers:
        part = module.at(layer)
        gate, up = (quantize(half) for half in part.gate_up_proj.detach().chunk(2))
        gate_up, down = in_place(pack([gate, up]), pack([quantize(part.down_proj.detach())]))
        packed[layer] = PackedLayer(gate_up, down, -(-module.width // GROUP), module.gates[layer].float().numpy())
    return packed


class Sites:
    """The places of all experts that speak in a batch, in the order of layers, and each roster's own among them.

    Attributes:
        count: number of places. most: largest number at one layer.
        places: of the arrays that the kernel reads (see `kernels/decode/state.py`).
        row_bytes: of the rounded hidden values of one row, for each place.
        members: for each roster its places.
    """

    def __init__(
        self, rosters: Sequence[Roster], packed: Callable[[ExpertModule], Packed], layers: int, hidden: int
    ) -> None:
        self.rosters = tuple(rosters)  # keeps them alive, so that none of the same identity comes after it
        owners = [(layer, module) for roster in rosters for layer, own in roster.owners.items() for module in own]
        places = sorted({(layer, id(module)): module for layer, module in owners}.items(), key=lambda item: item[0])
        number = {key: i for i, (key, _) in enumerate(places)}
        parts = [packed(module)[layer] for (layer, _), module in places]
        self._parts = parts
        self.count = len(places)
        of_layer = np.bincount([layer for (layer, _), _ in places], minlength=layers)[:layers]
        self.most = int(of_layer.max(initial=0))
        decays = [0.5 ** (1.0 / module.settings.half_life) for _, module in places]
        self._arrays = (
            np.concatenate(([0], of_layer.cumsum())).astype(np.int64),
            np.array([part.gate_up.ctypes.data for part in parts], np.int64),
            np.array([part.down.ctypes.data for part in parts], np.int64),
            np.array([part.inner for part in parts], np.int64),
            np.ascontiguousarray(
                np.stack([part.gate for part in parts]) if parts else np.zeros((0, 2, hidden + 1)), np.float32
            ),
            np.array(decays, np.float32),
        )
        self.places = placed(*self._arrays)
        self.row_bytes = [row_bytes(part.inner) for part in parts]
        self.members = {
            id(roster): [number[layer, id(module)] for layer, own in sorted(roster.owners.items()) for module in own]
            for roster in rosters
        }

    def speakers(self, roster: Roster, said_RS: np.ndarray) -> list[str | None]:
        """Return for each row the module of the largest weight, averaged over its layers, or None."""
        names = [module.name for _, own in sorted(roster.owners.items()) for module in own]
        own_RM = said_RS[:, self.members[id(roster)]]
        modules = [module.name for module in roster.modules]
        means_RN = np.stack([own_RM[:, [name == other for other in names]].mean(1) for name in modules], 1)
        best_R = means_RN.argmax(1)
        return [modules[best] if means[best] > 0 else None for best, means in zip(best_R, means_RN, strict=True)]
