"""The memory of the compiled step, and the plan of a batch that it is called with."""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from deepseek.infer.compiled_experts import Sites
from deepseek.infer.compiled_model import PackedModel
from deepseek.infer.compiled_state import CompiledState, aligned
from deepseek.infer.runner import Chunk
from deepseek.kernels.decode import step
from deepseek.kernels.decode.state import PAGE
from deepseek.kernels.int8 import GROUP, row_bytes

QUERIES = 6  # most queries of a unit of attention
FEWEST = 3  # fewer leave vector units idle, and keys and values are read again by every unit
UNITS = 4  # units for each thread that are enough to share attention evenly


class Scratch:
    """Memory that grows with the largest batch so far and is used by every step.

    A buffer holds what its name says in `Work` (`kernels/decode/state.py`).
    """

    def __init__(self, model: PackedModel) -> None:
        self.model, self._room, self._span, self._sizes = model, 0, 0, (0, 0)
        self._buffers: dict[str, np.ndarray] = {}

    def step(
        self, chunks: Sequence[Chunk], first: list[int], kept: list[int], sites: Sites
    ) -> tuple[Tensor, np.ndarray]:
        """Compute a batch; return the logits `[R, V]` and the experts' weights `[N, sites]`.

        Args:
            first: row of each chunk's first token, and the number of rows.
            kept: rows that need logits.
        """
        states = [_state(chunk) for chunk in chunks]
        longest = max(state.length + len(chunk.ids) for state, chunk in zip(states, chunks, strict=True))
        rows, threads = first[-1], torch.get_num_threads()
        self.model.reach(longest)
        self._grow(rows, -(-longest // PAGE) * PAGE, threads, sites)
        plan = self._plan(chunks, states, first, kept, sites, threads)
        logits_RV = torch.empty(len(kept), self.model.vocabulary)
        buffers = self._buffers
        said_NS = buffers["said"][: rows * sites.count].reshape(rows, sites.count)
        said_NS[:] = 0
        buffers["sync"][:] = 0
        work = self._addresses
        step.run(
            [*self.model.addresses, plan.ctypes.data, len(plan), *sites.addresses, *work[:7], logits_RV.data_ptr(),
             *work[7:], self.model.positions]
        )  # fmt: skip
        return logits_RV, said_NS

    def _plan(
        self, chunks: Sequence[Chunk], states: list[CompiledState], first: list[int], kept: list[int], sites: Sites,
        threads: int,
    ) -> np.ndarray:  # fmt: skip
        """Return the batch as one array of numbers (`_batch` and `_sites` in `kernels/decode/step.py` read it)."""
        model, lengths = self.model, [len(chunk.ids) for chunk in chunks]
        rest, most = model.heads // model.groups, max(len(state.pages) for state in states)
        block = min(QUERIES, max(FEWEST, first[-1] * model.heads // (UNITS * threads)))
        units = accumulate((model.groups * -(-length * rest // block) for length in lengths), initial=0)
        members = [[] if s.armed is None else sites.members[id(s.armed.roster)] for s in states]
        forced = [s.armed is not None and s.armed.roster.banks is None for s in states]
        rosters = [None if s.armed is None or not s.armed.roster.banks else s.armed.roster.banks for s in states]
        limits = [0 if banks is None else next(iter(banks.values())).max_experts for banks in rosters]
        assert all(limit or flag or not own for limit, flag, own in zip(limits, forced, members, strict=True))
        header = [
            first[-1], len(chunks), most, len(kept), block, sites.count, sum(map(len, members)), threads, self._span,
            self._room, sites.most,
        ]  # fmt: skip
        numbers = header + [token for chunk in chunks for token in chunk.ids]
        for state, length in zip(states, lengths, strict=True):
            numbers += range(state.length, state.length + length)
        for c, length in enumerate(lengths):
            numbers += [c] * length
        numbers += [*first, *units]
        for state in states:
            numbers += [*state.addresses, *[0] * (most - len(state.pages))]
        numbers += [*kept, *accumulate(map(len, members), initial=0), *(site for own in members for site in own)]
        numbers += [*(state.sums.ctypes.data for state in states), *limits]
        return np.array(numbers, np.int64)

    def _grow(self, rows: int, span: int, threads: int, sites: Sites) -> None:
        """Have room for so many rows, attention over so many keys, and the experts of `sites`."""
        need = (threads, id(sites))
        if rows <= self._room and span <= self._span and need == self._sizes:
            return
        room = self._room = max(rows, self._room)
        span = self._span = span if span <= self._span else max(span, 2 * self._span)
        self._span, self._sizes, self._sites = max(span, self._span), need, sites
        model = self.model
        parts = (-(-model.hidden // GROUP), model.heads * model.width // GROUP, model.inner)
        strides = [row_bytes(groups) for groups in parts]
        self._rows = [aligned(room * stride) for stride in strides]
        self._expert_rows = [aligned(room * stride) for stride in sites.row_bytes]
        tables = [
            memory.ctypes.data + stride * np.arange(room) for memory, stride in zip(self._rows, strides, strict=True)
        ]
        self._buffers = {
            "stream": _floats(room * model.hidden),
            "projected": _floats(room * (model.heads + 2 * model.groups) * model.width),
            "queries": aligned(2 * room * model.heads * model.width),
            "tables": np.array(tables, np.int64),
            "scores": _floats(room * sites.most * 2),
            "said": _floats(room * sites.count),
            "expert_rows": np.array([memory.ctypes.data for memory in self._expert_rows], np.int64),
            "weighed": _floats(threads * QUERIES * self._span),
            "shares": aligned(2 * threads * QUERIES * self._span),
            "own": np.zeros((threads, room), np.int64),
            "sync": aligned(64 * (model.layers + 1)).view(np.int64),
        }
        self._addresses = [array.ctypes.data for array in self._buffers.values()]


def _floats(count: int) -> np.ndarray:
    return aligned(4 * count).view(np.float32)


def _state(chunk: Chunk) -> CompiledState:
    assert isinstance(chunk.state, CompiledState)
    return chunk.state
