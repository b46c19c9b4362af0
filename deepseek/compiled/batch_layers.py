"""The layers of a batch: where its rows enter the model, which pages hold the keys and values of
each layer, and what is stored at the cuts (see `model/layer_parts.py`).
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from deepseek.compiled.state import CompiledState, PageSegment
from deepseek.kernels.numba.buffers import Value
from deepseek.runner import Chunk


def by_entry(states: Sequence[CompiledState]) -> list[list[int]]:
    """Return the indices of the states, grouped by the layer at which their next chunks enter the
    model.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    for index, state in enumerate(states):
        groups[entry_layer(state)].append(index)
    return list(groups.values())


def entry_layer(state: CompiledState) -> int:
    """Return the layer after whose attention a state's next chunk enters; -1: at layer 0."""
    part = state.entry().part
    return state.cuts[part] if part >= 0 else -1


@dataclass(frozen=True)
class BatchLayers:
    """The step's arguments that depend on the layer (in `BATCH` of `compiled/abi.py`).

    Attributes:
        cuts: layers at which a state of the batch is divided, in increasing order.
        values: value of each buffer.
        extents: its extents.
        streams_CND: receives the residual stream at each cut; C = 0 if no chunk is stored.
    """

    cuts: list[int]
    values: dict[str, Value]
    extents: dict[str, int]
    streams_CND: np.ndarray

    @staticmethod
    def of(
        chunks: Sequence[Chunk],
        states: Sequence[CompiledState],
        rows: int,
        layers: int,
        hidden: int,
    ) -> "BatchLayers":
        """Return the layers of a batch.

        Args:
            chunks: the chunks, which enter the model at the same layer.
            states: their states.
            rows: number of new tokens.
            layers: number of layers of the model.
            hidden: width D of the residual stream.
        """
        cuts = sorted(set(chain.from_iterable(state.cuts for state in states)))
        stored_cuts = cuts if any(chunk.store for chunk in chunks) else []
        streams_CND = np.empty((len(stored_cuts), rows, hidden), np.float32)
        entries = [state.entry().stream_TD for state in states]
        entering = [stream_TD for stream_TD in entries if stream_TD is not None]
        entering_ND = np.concatenate(entering or [np.zeros((0, hidden), np.float32)])
        addresses_PCN = _addresses(states, cuts)
        shape = states[0].parts[0].shape
        values: dict[str, Value] = {
            "pages": addresses_PCN,
            "layer_bytes": shape.layer_bytes,
            "codes_start": shape.codes_start,
            "sums_start": shape.sums_start,
            "part_of_layer": [bisect_left(cuts, layer) for layer in range(layers)],
            "entry": entry_layer(states[0]),
            "entering": entering_ND,
            "cut_of_layer": [
                stored_cuts.index(layer) if layer in stored_cuts else -1 for layer in range(layers)
            ],
            "streams": streams_CND,
        }
        extents = {
            "parts": len(cuts) + 1,
            "pages": addresses_PCN.shape[-1],
            "entering": len(entering_ND),
            "cuts": len(stored_cuts),
        }
        return BatchLayers(cuts, values, extents, streams_CND)

    def segments(
        self, chunk: Chunk, state: CompiledState, first_row: int, entered: int
    ) -> dict[int, PageSegment]:
        """Return the segments of a chunk that its `store` asks for, by part.

        Args:
            chunk: the chunk.
            state: its state, with the chunk's tokens.
            first_row: row of its first token.
            entered: part at whose end the chunk entered the model; -1: at layer 0.
        """
        rows = slice(first_row, first_row + len(chunk.ids))
        segments: dict[int, PageSegment] = {}
        for part in chunk.store:
            if part > entered:
                stream_TD = (
                    self.streams_CND[self.cuts.index(state.cuts[part]), rows].copy()
                    if part < len(state.cuts)
                    else None
                )
                segments[part] = state.segment(part, state.length - len(chunk.ids), stream_TD)
        return segments


def _addresses(states: Sequence[CompiledState], cuts: Sequence[int]) -> np.ndarray:
    """Return the addresses of each state's pages `[parts, chunks, pages]`, padded with zeros.

    A state that is divided at fewer cuts than the batch has the same pages at several parts.
    """
    parts = [
        [state.parts[bisect_left(state.cuts, cut)].addresses for state in states]
        for cut in (*cuts, np.inf)
    ]
    pages = max(len(addresses) for addresses in chain.from_iterable(parts))
    addresses_PCN = np.zeros((len(parts), len(states), pages), np.int64)
    for place, part in enumerate(parts):
        for number, addresses in enumerate(part):
            addresses_PCN[place, number, : len(addresses)] = addresses
    return addresses_PCN
