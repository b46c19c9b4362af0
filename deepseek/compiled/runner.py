"""The compiled runner: 8-bit weights, and the whole forward pass in one call (see
`compiled/step.py`).
"""

import threading
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import accumulate, chain
from typing import NamedTuple, TypeVar
from weakref import ReferenceType, ref

import numpy as np
import torch

from deepseek.compiled import step
from deepseek.compiled.abi import BATCH, PAGE, QUERIES, RECENT, SUMS, SYNC_STRIDE, WORK
from deepseek.compiled.batch_layers import BatchLayers, by_entry
from deepseek.compiled.page_shape import PageShape
from deepseek.compiled.sites_cache import SitesCache
from deepseek.compiled.state import CompiledState, member_count
from deepseek.compiled.support import unsupported_reason
from deepseek.compiled.weights import PackedModel, Sites, module_bytes, pack_module
from deepseek.errors import ConfigError
from deepseek.kernels.int8_layout import GROUP, row_bytes
from deepseek.kernels.numba.buffers import KernelArguments, Value, aligned
from deepseek.model.experts.adapter import AdapterModule
from deepseek.model.experts.armed import ArmedExperts
from deepseek.model.experts.module import ExpertModule
from deepseek.model.layer_parts import layer_parts
from deepseek.model.transformer import DeepSeekModel
from deepseek.runner import Chunk, RunnerOutput, in_groups

T = TypeVar("T")


class BatchRows(NamedTuple):
    """The rows of a batch: the new tokens of its chunks, concatenated.

    Attributes:
        first: row of each chunk's first token, followed by the number of rows.
        kept: rows whose logits are needed.
    """

    first: list[int]
    kept: list[int]


class StepOutput(NamedTuple):
    """Result of one call of the step.

    Attributes:
        logits_RV: logits of the kept rows.
        weights_NS: weights of the experts in all rows, by site.
        layers: the layers of the batch, with the residual streams at the cuts.
    """

    logits_RV: np.ndarray
    weights_NS: np.ndarray
    layers: BatchLayers


def _rows(chunks: Sequence[Chunk]) -> BatchRows:
    """Return the row layout of a batch."""
    first = [0, *accumulate(len(chunk.ids) for chunk in chunks)]
    kept = [range(end - chunk.keep, end) for chunk, end in zip(chunks, first[1:], strict=True)]
    return BatchRows(first, [*chain.from_iterable(kept)])


class Scratch:
    """Work buffers of the step (`WORK` in `compiled/abi.py`), sized for the largest batch so far.

    Args:
        model: the packed weights.
    """

    def __init__(self, model: PackedModel) -> None:
        self.model = model
        self._capacity = 0
        self._span = 0
        self._threads = 0
        # Weak, so that the weights of its experts can be freed with the sites.
        self._sites: ReferenceType[Sites] | None = None

    def step(
        self, chunks: Sequence[Chunk], states: list[CompiledState], rows: BatchRows, sites: Sites
    ) -> StepOutput:
        """Compute one batch.

        Args:
            chunks: the chunks of the batch, which enter the model at the same layer.
            states: the state of each chunk, with pages allocated for its new tokens.
            rows: the row layout of the batch.
            sites: the experts of the batch.
        """
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
        extents = self.model.extents
        layers = BatchLayers.of(chunks, states, count, extents["layers"], extents["hidden"])
        batch = self._batch(chunks, states, rows, sites, threads, logits_RV, layers)
        native = self.model.native.arguments
        step.run(self.model.arguments, batch, sites.arguments, native, self._arguments)
        return StepOutput(logits_RV, expert_weights_NS, layers)

    def _batch(
        self,
        chunks: Sequence[Chunk],
        states: list[CompiledState],
        rows: BatchRows,
        sites: Sites,
        threads: int,
        logits_RV: np.ndarray,
        layers: BatchLayers,
    ) -> KernelArguments:
        """Return the step's arguments that describe the batch (`BATCH` in `compiled/abi.py`)."""
        extents = self.model.extents
        lengths = [len(chunk.ids) for chunk in chunks]
        starts = [state.length for state in states]
        unit_queries = self.model.unit_queries(rows.first[-1], threads)
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
            "first_unit": [*accumulate(units, initial=0)],
            "unit_queries": unit_queries,
            "kept_rows": rows.kept,
            "first_member": [*accumulate(map(len, members), initial=0)],
            "member_sites": _joined(members),
            "member_gates": _joined(gates),
            "member_factors": np.array(_joined(map(_factors, states)), np.float32),
            "gate_sums": [state.sums.ctypes.data for state in states],
            # A roster has no limit if its experts are forced, that is, run without gates.
            "max_experts": [0 if roster is None else roster.max_experts or 0 for roster in rosters],
            "logits": logits_RV,
            **layers.values,
        }
        sizes = {
            "rows": rows.first[-1],
            "chunks": len(chunks),
            "kept": len(rows.kept),
            "members": sum(map(len, members)),
            "vocabulary": extents["vocabulary"],
            "layers": extents["layers"],
            "hidden": extents["hidden"],
            **layers.extents,
        }
        return BATCH.arguments(values, sizes)

    def _grow(self, rows: int, span: int, threads: int, sites: Sites) -> None:
        """Allocate buffers for at least `rows` rows, attention over `span` keys, and the experts of
        `sites`.
        """
        if (
            rows <= self._capacity
            and span <= self._span
            and threads == self._threads
            and self._sites is not None
            and sites is self._sites()
        ):
            return
        self._capacity = max(rows, self._capacity)
        # Doubling avoids an allocation for every new page of a long sequence.
        self._span = self._span if span <= self._span else max(span, 2 * self._span)
        self._threads = threads
        self._sites = ref(sites)
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
            "attended_rows": -(-model["heads"] * model["width"] // GROUP),
        }
        self._row_memory = []  # owns the quantised rows, which the kernel reads by address
        for name, count in groups.items():
            stride = row_bytes(count)
            memory = aligned(self._capacity * stride)
            self._buffers[name][:] = memory.ctypes.data + stride * np.arange(self._capacity)
            self._row_memory.append(memory)
        inner_memory = aligned(self._capacity * row_bytes(model["inner"]))
        self._buffers["inner_rows"][:] = inner_memory.ctypes.data
        self._row_memory.append(inner_memory)
        expert_memory = [aligned(self._capacity * stride) for stride in sites.row_bytes]
        self._buffers["expert_rows"][:] = [memory.ctypes.data for memory in expert_memory]
        self._row_memory += expert_memory
        calls = self._capacity * model["slots"]
        routed_memory = aligned(calls * row_bytes(self.model.native.inner))
        self._buffers["routed_rows"][:] = routed_memory.ctypes.data
        self._row_memory.append(routed_memory)
        self._arguments = WORK.arguments(self._buffers, model | sizes)


def _joined(parts: Iterable[Iterable[T]]) -> list[T]:
    return [*chain.from_iterable(parts)]


def _state(chunk: Chunk) -> CompiledState:
    assert isinstance(chunk.state, CompiledState)
    return chunk.state


def supports(model: DeepSeekModel) -> bool:
    """Whether the compiled runner supports `model`.

    It supports dense models and mixtures of experts on the CPU (see `compiled/support.py`).

    Args:
        model: the model to check.
    """
    return unsupported_reason(model) is None


class CompiledRunner:
    """Runs a model that it `supports`, with weights quantised to 8 bits.

    Its logits are those of the quantised model. The result for a token depends, bit for bit,
    neither on the batch nor on how the prompt is cut into chunks.

    Args:
        model: the model; its weights are packed here, which takes a while.

    Attributes:
        model: as passed.
        weight_bytes: bytes of packed weights. A step reads each matrix at most once, those of
            native experts only if a token is routed to them.

    Raises:
        ConfigError: the model is not supported; the message names the fields.
    """

    def __init__(self, model: DeepSeekModel) -> None:
        reason = unsupported_reason(model)
        if reason is not None:
            raise ConfigError(f"{reason} Use TorchRunner instead.")
        self.model = model
        self._sites = SitesCache(len(model.layers), model.config.hidden_size)
        weights = PackedModel(model)
        self._extents = weights.extents
        self._hashes = weights.hashes
        self.weight_bytes = weights.nbytes
        self._work = Scratch(weights)
        self._lock = threading.Lock()

    def computes(self, armed: ArmedExperts | None) -> bool:
        """Return whether the step supports these experts: it does, unless there are adapters, which
        act inside its fused projections.
        """
        return armed is None or not armed.adapts

    def prepare(self, module: ExpertModule | AdapterModule) -> None:
        """Quantise and pack an expert; do nothing for an adapter, which this runner does not
        support.
        """
        if isinstance(module, ExpertModule):
            module.form(pack_module)

    def expert_bytes(self, armed: ArmedExperts | None) -> dict[ExpertModule, int]:
        return {} if armed is None else {m: module_bytes(m) for m in armed.roster.stored}

    def divides(self, armed: ArmedExperts | None) -> bool:
        return self.computes(armed)

    def state_bytes(self, length: int, armed: ArmedExperts | None) -> int:
        layers = range(len(self.model.layers))
        sums_bytes = 4 * SUMS * RECENT * member_count(armed, layers)
        return -(-length // PAGE) * self._page_shape(layers).nbytes + sums_bytes

    def start(
        self, armed: ArmedExperts | None, capacity: int, cuts: tuple[int, ...] = ()
    ) -> CompiledState:
        if not self.computes(armed):
            raise ConfigError("The compiled runner does not compute adapters; use an Engine.")
        stored = self.expert_bytes(armed)
        if stored:
            with self._lock:  # frees weights that the cache has evicted, before more are read
                self._sites.drop_outdated()
        for module in stored:
            self.prepare(module)
        parts = layer_parts(len(self.model.layers), cuts)
        shapes = [self._page_shape(part.cached) for part in parts]
        return CompiledState(parts, shapes, armed, capacity)

    def forward(self, chunks: Sequence[Chunk]) -> RunnerOutput:
        states = [_state(chunk) for chunk in chunks]
        groups = by_entry(states)
        with self._lock:
            # The same for all groups, because other sites would reallocate the work buffers.
            sites = self._sites.get(
                [state.armed.roster for state in states if state.armed is not None]
            )
            return in_groups(chunks, groups, [partial(self._step, sites=sites)] * len(groups))

    def _step(self, chunks: Sequence[Chunk], sites: Sites) -> RunnerOutput:
        """Compute chunks that enter the model at the same layer."""
        states = [_state(chunk) for chunk in chunks]
        for chunk, state in zip(chunks, states, strict=True):
            state.reserve(len(chunk.ids))
        rows = _rows(chunks)
        output = self._work.step(chunks, states, rows, sites)
        segments = []
        for chunk, state, first in zip(chunks, states, rows.first, strict=False):
            entered = state.entry().part
            state.advance(len(chunk.ids))
            segments.append(output.layers.segments(chunk, state, first, entered))
        experts = self._speakers(chunks, states, rows.kept, sites, output.weights_NS)
        return RunnerOutput(torch.from_numpy(output.logits_RV), experts, tuple(segments))

    def _page_shape(self, layers: range) -> PageShape:
        """Return the shape of pages with these layers' keys and values."""
        extents = self._extents
        return PageShape(
            layers,
            extents["groups"],
            extents["page_width"],
            extents["bias_heads"],
            self._hashes.layers,
            self._hashes.rounds,
            self._hashes.far_field,
        )

    def _speakers(
        self,
        chunks: Sequence[Chunk],
        states: list[CompiledState],
        kept: list[int],
        sites: Sites,
        expert_weights_NS: np.ndarray,
    ) -> tuple[str | None, ...]:
        """Return, for each kept row, the expert with the largest weight; None if no expert
        fired.
        """
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


def _factors(state: CompiledState) -> list[float]:
    """Return the factor that a sequence sets on the weight of each of its members."""
    if state.armed is None:
        return []
    factors = state.armed.factors
    owners = state.armed.roster.owners
    return [
        factors.get(module.name, 1.0) for _, modules in sorted(owners.items()) for module in modules
    ]
