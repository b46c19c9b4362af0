"""The compiled runner: 8-bit weights, and the whole forward pass in one call (see `compiled/step.py`)."""

import math
import threading
from collections.abc import Sequence
from itertools import accumulate, chain
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from deepseek.compiled import step
from deepseek.compiled.abi import PAGE, RECENT
from deepseek.compiled.state import CompiledState, PageShape, aligned
from deepseek.compiled.weights import Packed, PackedModel, Sites, pack_module
from deepseek.kernels.int8 import GROUP, row_bytes
from deepseek.kernels.numba import openmp
from deepseek.kernels.numba.launch import placed
from deepseek.model.experts.armed import ArmedExperts, Roster
from deepseek.model.experts.module import ExpertModule
from deepseek.model.transformer import DeepSeekModel
from deepseek.runner import Chunk, RunnerOutput

QUERIES = 6  # most queries of a unit of attention
FEWEST = 3  # fewer leave vector units idle, and keys and values are read again by every unit
UNITS = 4  # units for each thread that are enough to share attention evenly


class Scratch:
    """Memory that grows with the largest batch so far and is used by every step.

    A buffer holds what its name says in `Work` (`compiled/abi.py`), in that order.
    """

    def __init__(self, model: PackedModel) -> None:
        self.model, self._room, self._span, self._sizes = model, 0, 0, (0, 0)
        self._buffers: dict[str, np.ndarray] = {}

    def step(
        self, chunks: Sequence[Chunk], states: list[CompiledState], first: list[int], kept: list[int], sites: Sites
    ) -> tuple[Tensor, np.ndarray]:
        """Compute a batch; return the logits `[R, V]` and the experts' weights `[N, sites]`.

        Args:
            first: row of each chunk's first token, and the number of rows.
            kept: rows that need logits.
        """
        longest = max(state.length + len(chunk.ids) for state, chunk in zip(states, chunks, strict=True))
        rows, threads = first[-1], torch.get_num_threads()
        self.model.reach(longest)
        self._grow(rows, -(-longest // PAGE) * PAGE, threads, sites)
        logits_RV = np.empty((len(kept), self.model.vocabulary), np.float32)
        said_NS = self._buffers["said"][:rows]
        said_NS[:] = 0
        self._buffers["sync"][:] = 0
        plan, places = self._plan(chunks, states, first, kept, sites, threads)
        step.run([*self.model.places, *places, *placed(logits_RV), *sites.places, *self._places])
        del plan  # not before the step has read it
        return torch.from_numpy(logits_RV), said_NS

    def _plan(
        self, chunks: Sequence[Chunk], states: list[CompiledState], first: list[int], kept: list[int], sites: Sites,
        threads: int,
    ) -> tuple[np.ndarray, list[int]]:  # fmt: skip
        """Return the whole numbers of a batch (`Batch` in `compiled/abi.py`) in one array, and their places."""
        model, lengths = self.model, [len(chunk.ids) for chunk in chunks]
        rest, most = model.heads // model.groups, max(len(state.pages) for state in states)
        block = min(QUERIES, max(FEWEST, first[-1] * model.heads // (UNITS * threads)))
        units = (model.groups * -(-length * rest // block) for length in lengths)
        members = [[] if s.armed is None else sites.members[id(s.armed.roster)] for s in states]
        gates = [[] if s.armed is None else sites.gates[id(s.armed.roster)] for s in states]
        limits = [0 if s.armed is None else s.armed.roster.max_experts or 0 for s in states]  # 0 forces those there are
        parts = {
            "ids": [token for chunk in chunks for token in chunk.ids],
            "positions": [
                at for s, length in zip(states, lengths, strict=True) for at in range(s.length, s.length + length)
            ],
            "chunk": [number for number, length in enumerate(lengths) for _ in range(length)],
            "first": first,
            "pages": [address for s in states for address in (*s.addresses, *[0] * (most - len(s.pages)))],
            "units": [*accumulate(units, initial=0)],
            "block": [block],
            "kept": kept,
            "member_first": [*accumulate(map(len, members), initial=0)],
            "members": [site for own in members for site in own],
            "gates": [gate for own in gates for gate in own],
            "sums": [state.sums.ctypes.data for state in states],
            "most": limits,
        }
        plan = np.array([*chain(*parts.values())], np.int64)
        places, address = list[int](), plan.ctypes.data
        for name, part in parts.items():
            places += [address, *((len(chunks), most) if name == "pages" else (len(part),))]
            address += 8 * len(part)
        return plan, places

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
            "stream": _zeros(np.float32, room, model.hidden),
            "projected": _zeros(np.float32, room, (model.heads + 2 * model.groups) * model.width),
            "queries": _zeros(np.uint16, model.groups, room, model.heads // model.groups, model.width),
            "tables": np.array(tables, np.int64),
            "scores": _zeros(np.float32, room, sites.most, 2),
            "said": _zeros(np.float32, room, sites.count),
            "expert_rows": np.array([memory.ctypes.data for memory in self._expert_rows], np.int64),
            "weighed": _zeros(np.float32, threads, QUERIES, self._span),
            "shares": _zeros(np.uint16, threads, QUERIES, self._span),
            "own": np.zeros((threads, room), np.int64),
            "sync": _zeros(np.int64, 8 * (model.layers + 1)),
        }
        self._places = placed(*self._buffers.values())


def _zeros(dtype: type[np.number], *shape: int) -> np.ndarray:
    return aligned(np.dtype(dtype).itemsize * math.prod(shape)).view(dtype).reshape(shape)


def _state(chunk: Chunk) -> CompiledState:
    assert isinstance(chunk.state, CompiledState)
    return chunk.state


def supports(model: DeepSeekModel) -> bool:
    """Whether the compiled runner computes `model`: dense, on the CPU, rotary positions, heads of 64 or 128."""
    config = model.config
    return (
        model.device.type == "cpu" and openmp.runtime() is not None
        and config.attention == "full" and config.positional_encoding == "rope" and config.num_experts == 0
        and config.qk_norm in ("none", "head") and config.clip_qkv is None and config.head_dim % GROUP == 0
    )  # fmt: skip


class CompiledRunner:
    """Runs a model that it `supports`. Its logits are those of a model whose weights are rounded to 8 bits.

    The result for a token depends neither on the batch nor on the pieces in which a prompt comes, to the last bit.
    """

    def __init__(self, model: DeepSeekModel) -> None:
        self.model = model
        self._packed = WeakKeyDictionary[ExpertModule, Packed]()  # each expert that some sequence uses, rounded once
        self._sites: dict[tuple[int, ...], Sites] = {}
        weights = PackedModel(model)
        self._shape = PageShape(weights.layers * weights.groups, weights.width)
        self.weight_bytes = weights.nbytes  # read once in every step
        self._work = Scratch(weights)
        self._lock = threading.Lock()

    def prepare(self, module: ExpertModule) -> None:
        self._packed_of(module)

    def state_bytes(self, length: int, armed: ArmedExperts | None) -> int:
        return -(-length // PAGE) * self._shape.nbytes + 12 * RECENT * _members(armed)

    def start(self, armed: ArmedExperts | None, capacity: int) -> CompiledState:
        return CompiledState(self._shape, armed, _members(armed), capacity)

    def forward(self, chunks: Sequence[Chunk]) -> RunnerOutput:
        states = [_state(chunk) for chunk in chunks]
        with self._lock:
            for chunk, state in zip(chunks, states, strict=True):
                state.reserve(len(chunk.ids))
            sites = self._sites_of([state.armed.roster for state in states if state.armed is not None])
            first = [0, *accumulate(len(chunk.ids) for chunk in chunks)]
            kept = [row for chunk, end in zip(chunks, first[1:], strict=True) for row in range(end - chunk.keep, end)]
            logits_RV, said = self._work.step(chunks, states, first, kept, sites)
            for chunk, state in zip(chunks, states, strict=True):
                state.length += len(chunk.ids)
            return RunnerOutput(logits_RV, self._speakers(chunks, kept, sites, said))

    def _packed_of(self, module: ExpertModule) -> Packed:
        """Return an expert, rounded and packed. Any thread may ask."""
        if module not in self._packed:
            self._packed[module] = pack_module(module)
        return self._packed[module]

    def _sites_of(self, rosters: list[Roster]) -> Sites:
        """Return the places of the experts of these rosters."""
        distinct = {id(roster): roster for roster in rosters}
        key = tuple(sorted(distinct))
        if key not in self._sites:
            if len(self._sites) >= 16:
                self._sites.clear()
            layers, hidden = len(self.model.layers), self.model.config.hidden_size
            self._sites[key] = Sites(list(distinct.values()), self._packed_of, layers, hidden)
        return self._sites[key]

    def _speakers(
        self, chunks: Sequence[Chunk], kept: list[int], sites: Sites, said_NS: np.ndarray
    ) -> tuple[str | None, ...]:
        if not sites.count:
            return (None,) * len(kept)
        names: list[str | None] = []
        for chunk in chunks:
            rows, armed = kept[len(names) : len(names) + chunk.keep], chunk.state.armed  # type: ignore[attr-defined]
            names += [None] * chunk.keep if armed is None or not rows else sites.speakers(armed.roster, said_NS[rows])
        return tuple(names)


def _members(armed: ArmedExperts | None) -> int:
    """Return the number of layers at which experts of a sequence have gates, over all experts."""
    return sum(len(own) for own in armed.roster.owners.values()) if armed is not None else 0
