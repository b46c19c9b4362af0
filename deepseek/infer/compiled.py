"""The compiled runner: 8-bit weights, and the whole forward pass in one call (see `kernels/decode/step.py`)."""

import threading
from collections.abc import Sequence
from itertools import accumulate
from weakref import WeakKeyDictionary

import numpy as np

from deepseek.infer.compiled_experts import Packed, Sites, pack_module
from deepseek.infer.compiled_model import PackedModel
from deepseek.infer.compiled_state import CompiledState, PageShape
from deepseek.infer.compiled_step import Scratch
from deepseek.infer.runner import Chunk, RunnerOutput
from deepseek.kernels import openmp
from deepseek.kernels.decode.state import PAGE, RECENT
from deepseek.kernels.int8 import GROUP
from deepseek.model.experts.armed import ArmedExperts, Roster
from deepseek.model.experts.module import ExpertModule
from deepseek.model.transformer import DeepSeekModel


def supports(model: DeepSeekModel) -> bool:
    """Whether the compiled runner computes `model`: dense, on the CPU, rotary positions, heads of 64 or 128."""
    config = model.config
    return (
        model.device.type == "cpu" and openmp.runtime() is not None
        and config.attention == "full" and config.positional_encoding == "rope" and config.num_experts == 0
        and config.qk_norm in ("none", "head") and config.clip_qkv is None and (config.head_dim or 1) % GROUP == 0
    )  # fmt: skip


class CompiledRunner:
    """Runs a model that it `supports`. Its logits are those of a model whose weights are rounded to 8 bits.

    The result for a token depends neither on the batch nor on the pieces in which a prompt comes, to the last bit.
    """

    def __init__(self, model: DeepSeekModel) -> None:
        self.model = model
        config = model.config
        assert config.head_dim is not None and config.num_key_value_heads is not None
        self._shape = PageShape(config.num_hidden_layers * config.num_key_value_heads, config.head_dim)
        self._packed = WeakKeyDictionary[ExpertModule, Packed]()  # each expert that some sequence uses, rounded once
        self._sites: dict[tuple[int, ...], Sites] = {}
        weights = PackedModel(model)
        self.weight_bytes = weights.nbytes  # read once in every step
        self._work = Scratch(weights)
        self._lock = threading.Lock()

    def prepare(self, armed: ArmedExperts | None) -> None:
        for module in armed.roster.modules if armed is not None else ():
            self._packed_of(module)

    def state_bytes(self, length: int, armed: ArmedExperts | None) -> int:
        return -(-length // PAGE) * self._shape.nbytes + 12 * RECENT * _members(armed)

    def start(self, armed: ArmedExperts | None, capacity: int) -> CompiledState:
        return CompiledState(self._shape, armed, _members(armed), capacity)

    def forward(self, chunks: Sequence[Chunk]) -> RunnerOutput:
        states = [chunk.state for chunk in chunks]
        with self._lock:
            for chunk, state in zip(chunks, states, strict=True):
                assert isinstance(state, CompiledState)
                state.reserve(len(chunk.ids))
            sites = self._sites_of([s.armed.roster for s in states if s.armed is not None])  # type: ignore[attr-defined]
            first = [0, *accumulate(len(chunk.ids) for chunk in chunks)]
            kept = [row for chunk, end in zip(chunks, first[1:], strict=True) for row in range(end - chunk.keep, end)]
            logits_RV, said = self._work.step(chunks, first, kept, sites)
            for chunk, state in zip(chunks, states, strict=True):
                state.advance(len(chunk.ids))  # type: ignore[attr-defined]
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
