"""The compiled runner: 8-bit weights, and the whole forward pass in one call (see
`compiled/step.py`).
"""

import threading
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from deepseek.compiled import step
from deepseek.compiled.abi import BATCH, PAGE, QUERIES, RECENT, SUMS, SYNC_STRIDE, WORK
from deepseek.compiled.state import CompiledState, PageShape
from deepseek.compiled.support import unsupported_reason
from deepseek.compiled.weights import Packed, PackedModel, Sites, pack_module
from deepseek.errors import ConfigError
from deepseek.kernels.int8 import GROUP, row_bytes
from deepseek.kernels.numba.buffers import KernelArguments, Value, aligned
from deepseek.model.experts.armed import ArmedExperts, Roster
from deepseek.model.experts.module import ExpertModule
from deepseek.model.transformer import DeepSeekModel
from deepseek.runner import Chunk, RunnerOutput

FEWEST = 3  # queries of a unit: fewer leave vector units idle, and keys and values are read again by every unit
UNITS = 4  # units for each thread that are enough to share attention evenly
SITES_CACHED = 16  # sets of rosters whose sites are kept


class BatchRows(NamedTuple):
    """The rows of a batch: its chunks' new tokens, one behind the other.

    Attributes:
        first: row of each chunk's first token, and the number of rows.
        kept: rows that need logits.
    """

    first: list[int]
    kept: list[int]


def _rows(chunks: Sequence[Chunk]) -> BatchRows:
    first = [0, *accumulate(len(chunk.ids) for chunk in chunks)]
    kept = [range(end - chunk.keep, end) for chunk, end in zip(chunks, first[1:], strict=True)]
    return BatchRows(first, [*chain.from_iterable(kept)])


class Scratch:
    """Memory that grows with the largest batch so far and is used by every step (`WORK` in
    `compiled/abi.py`).
    """

    def __init__(self, model: PackedModel) -> None:
        self.model = model
        self._capacity = 0
        self._span = 0
        self._threads = 0
        self._sites: Sites | None = None

    def step(
        self, chunks: Sequence[Chunk], states: list[CompiledState], rows: BatchRows, sites: Sites
    ) -> tuple[Tensor, np.ndarray]:
        """Compute a batch; return the logits `[R, V]` and the experts' weights `[N, sites]`."""
        longest = max(
            state.length + len(chunk.ids) for state, chunk in zip(states, chunks, strict=True)
        )
        count = rows.first[-1]
        threads = torch.get_num_threads()
        self.model.reach(longest)
        self._grow(count, -(-longest // PAGE) * PAGE, threads, sites)
        logits_RV = np.empty((len(rows.kept), self.model.extents["vocabulary"]), np.float32)
        expert_weights_NS = self._buffers["expert_weights"][:count]
        expert_weights_NS[:] = 0
        self._buffers["sync"][:] = 0
        batch = self._batch(chunks, states, rows, sites, threads, logits_RV)
        step.run(self.model.arguments, batch, sites.arguments, self._arguments)
        return torch.from_numpy(logits_RV), expert_weights_NS

    def _batch(
        self,
        chunks: Sequence[Chunk],
        states: list[CompiledState],
        rows: BatchRows,
        sites: Sites,
        threads: int,
        logits_RV: np.ndarray,
    ) -> KernelArguments:
        """Return what the step is given of a batch (`BATCH` in `compiled/abi.py`)."""
        extents = self.model.extents
        lengths = [len(chunk.ids) for chunk in chunks]
        starts = [state.length for state in states]
        pages = max(len(state.pages) for state in states)
        padded_pages = ([*state.addresses, *[0] * (pages - len(state.pages))] for state in states)
        unit_queries = min(
            QUERIES, max(FEWEST, rows.first[-1] * extents["heads"] // (UNITS * threads))
        )
        units = (
            extents["groups"] * -(-length * extents["group_heads"] // unit_queries)
            for length in lengths
        )
        rosters = [None if state.armed is None else state.armed.roster for state in states]
        members = [[] if roster is None else sites.members[id(roster)] for roster in rosters]
        gates = [[] if roster is None else sites.gates[id(roster)] for roster in rosters]
        positions = (
            range(start, start + length) for start, length in zip(starts, lengths, strict=True)
        )
        values: dict[str, Value] = {
            "input_ids": _joined(chunk.ids for chunk in chunks),
            "position_ids": _joined(positions),
            "chunk_of_row": _joined([number] * length for number, length in enumerate(lengths)),
            "first_row": rows.first,
            "pages": _joined(padded_pages),
            "first_unit": [*accumulate(units, initial=0)],
            "unit_queries": unit_queries,
            "kept_rows": rows.kept,
            "first_member": [*accumulate(map(len, members), initial=0)],
            "member_sites": _joined(members),
            "member_gates": _joined(gates),
            "gate_sums": [state.sums.ctypes.data for state in states],
            # A roster without a limit is of forced experts.
            "max_experts": [0 if roster is None else roster.max_experts or 0 for roster in rosters],
            "logits": logits_RV,
        }
        sizes = {
            "rows": rows.first[-1],
            "chunks": len(chunks),
            "pages": pages,
            "kept": len(rows.kept),
            "members": sum(map(len, members)),
            "vocabulary": extents["vocabulary"],
        }
        return BATCH.arguments(values, sizes)

    def _grow(self, rows: int, span: int, threads: int, sites: Sites) -> None:
        """Allocate for at least so many rows, attention over so many keys, and the experts of
        `sites`.
        """
        if (
            rows <= self._capacity
            and span <= self._span
            and threads == self._threads
            and sites is self._sites
        ):
            return
        self._capacity = max(rows, self._capacity)
        self._span = self._span if span <= self._span else max(span, 2 * self._span)
        self._threads = threads
        self._sites = sites
        model = self.model.extents
        sizes = {
            "capacity": self._capacity,
            "span": self._span,
            "threads": threads,
            "queries": QUERIES,
            "sites": sites.count,
            "layer_sites": sites.most_at_one_layer,
            "counters": SYNC_STRIDE * (model["layers"] + 1),
        }
        self._buffers = WORK.zeros(model | sizes)
        groups = {
            "normed_rows": -(-model["hidden"] // GROUP),
            "attended_rows": model["heads"] * model["width"] // GROUP,
            "inner_rows": model["inner"],
        }
        self._row_memory = []  # of quantised rows, which the kernel finds by their addresses
        for name, count in groups.items():
            stride = row_bytes(count)
            memory = aligned(self._capacity * stride)
            self._buffers[name][:] = memory.ctypes.data + stride * np.arange(self._capacity)
            self._row_memory.append(memory)
        expert_memory = [aligned(self._capacity * stride) for stride in sites.row_bytes]
        self._buffers["expert_rows"][:] = [memory.ctypes.data for memory in expert_memory]
        self._row_memory += expert_memory
        self._arguments = WORK.arguments(self._buffers, model | sizes)


def _joined(parts: Iterable[Iterable[int]]) -> list[int]:
    return [*chain.from_iterable(parts)]


def _state(chunk: Chunk) -> CompiledState:
    assert isinstance(chunk.state, CompiledState)
    return chunk.state


def supports(model: DeepSeekModel) -> bool:
    """Whether the compiled runner computes `model`: dense, on the CPU, rotary positions, heads of
    64 or 128.
    """
    return unsupported_reason(model) is None


class CompiledRunner:
    """Runs a model that it `supports`. Its logits are those of a model whose weights are quantised
    to 8 bits.

    The result for a token depends neither on the batch nor on the pieces in which a prompt comes,
    to the last bit.

    Raises:
        ConfigError: it does not support the model; the message names the fields.
    """

    def __init__(self, model: DeepSeekModel) -> None:
        reason = unsupported_reason(model)
        if reason is not None:
            raise ConfigError(f"{reason} Use TorchRunner instead.")
        self.model = model
        self._packed = WeakKeyDictionary[
            ExpertModule, Packed
        ]()  # each expert that some sequence uses, quantised once
        self._sites: dict[tuple[int, ...], Sites] = {}
        weights = PackedModel(model)
        self._shape = PageShape(
            weights.extents["layers"] * weights.extents["groups"], weights.extents["width"]
        )
        self.weight_bytes = weights.nbytes  # read once in every step
        self._work = Scratch(weights)
        self._lock = threading.Lock()

    def prepare(self, module: ExpertModule) -> None:
        self._packed_of(module)

    def state_bytes(self, length: int, armed: ArmedExperts | None) -> int:
        return -(-length // PAGE) * self._shape.nbytes + 4 * SUMS * RECENT * _members(armed)

    def start(self, armed: ArmedExperts | None, capacity: int) -> CompiledState:
        return CompiledState(self._shape, armed, _members(armed), capacity)

    def forward(self, chunks: Sequence[Chunk]) -> RunnerOutput:
        states = [_state(chunk) for chunk in chunks]
        with self._lock:
            for chunk, state in zip(chunks, states, strict=True):
                state.reserve(len(chunk.ids))
            sites = self._sites_of(
                [state.armed.roster for state in states if state.armed is not None]
            )
            rows = _rows(chunks)
            logits_RV, expert_weights_NS = self._work.step(chunks, states, rows, sites)
            for chunk, state in zip(chunks, states, strict=True):
                state.length += len(chunk.ids)
            return RunnerOutput(
                logits_RV, self._speakers(chunks, states, rows.kept, sites, expert_weights_NS)
            )

    def _packed_of(self, module: ExpertModule) -> Packed:
        """Return an expert, quantised and packed. Any thread may ask."""
        if module not in self._packed:
            self._packed[module] = pack_module(module)
        return self._packed[module]

    def _sites_of(self, rosters: list[Roster]) -> Sites:
        """Return the sites of the experts of these rosters."""
        distinct = {id(roster): roster for roster in rosters}
        key = tuple(sorted(distinct))
        if key not in self._sites:
            if len(self._sites) >= SITES_CACHED:
                self._sites.clear()
            layers = len(self.model.layers)
            hidden = self.model.config.hidden_size
            self._sites[key] = Sites(list(distinct.values()), self._packed_of, layers, hidden)
        return self._sites[key]

    def _speakers(
        self,
        chunks: Sequence[Chunk],
        states: list[CompiledState],
        kept: list[int],
        sites: Sites,
        expert_weights_NS: np.ndarray,
    ) -> tuple[str | None, ...]:
        """Return for each kept row the expert of the largest weight, or None."""
        if not sites.count:
            return (None,) * len(kept)
        names: list[str | None] = []
        for chunk, state in zip(chunks, states, strict=True):
            rows = kept[len(names) : len(names) + chunk.keep]
            if state.armed is None or not rows:
                names += [None] * chunk.keep
            else:
                names += sites.speakers(state.armed.roster, expert_weights_NS[rows])
        return tuple(names)


def _members(armed: ArmedExperts | None) -> int:
    """Return the number of layers at which experts of a sequence have gates, over all experts."""
    return sum(map(len, armed.roster.owners.values())) if armed is not None else 0
