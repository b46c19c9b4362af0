"""Weights as the compiled step wants them, rounded and packed: a model's, and plugged experts'."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from deepseek.compiled.state import aligned
from deepseek.kernels.int8 import GROUP, Int8Matrix, pack, quantize, row_bytes
from deepseek.kernels.numba.launch import placed
from deepseek.model.attention.full import FullAttention
from deepseek.model.experts.armed import Roster
from deepseek.model.experts.module import ExpertModule
from deepseek.model.feed_forward import SwiGLU
from deepseek.model.positions.rope import Rope
from deepseek.model.transformer import DeepSeekModel


class PackedLayer(NamedTuple):
    """An expert at one layer: packed projections, and groups of 64 hidden values."""

    gate_up: np.ndarray
    down: np.ndarray
    inner: int


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
        packed[layer] = PackedLayer(gate_up, down, -(-module.width // GROUP))
    return packed


def _gates(roster: Roster, hidden: int) -> np.ndarray:
    """Return the gates `[members, 2, D + 1]` of a roster, layer by layer; zeros where it is forced."""
    if roster.banks is None:
        return np.zeros((sum(map(len, roster.owners.values())), 2, hidden + 1), np.float32)
    banks = [bank for _, bank in sorted(roster.banks.items())]
    rows = [torch.cat([bank.weight, bank.bias[:, None]], 1).unflatten(0, (2, -1)).transpose(0, 1) for bank in banks]
    return torch.cat(rows).cpu().numpy()


class Sites:
    """The places of all experts that speak in a batch, in the order of layers, and each roster's own among them.

    Attributes:
        count: number of places. most: largest number at one layer.
        places: of the arrays that the kernel reads (see `compiled/abi.py`).
        row_bytes: of the rounded hidden values of one row, for each place.
        members: for each roster its places.
        gates: for each roster the gates of those, as rows of the kernel's array: they depend on the other candidates.
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
            np.concatenate([np.zeros((0, 2, hidden + 1), np.float32), *(_gates(roster, hidden) for roster in rosters)]),
            np.array(decays, np.float32),
        )
        self.places = placed(*self._arrays)
        self.row_bytes = [row_bytes(part.inner) for part in parts]
        self.members = {
            id(roster): [number[layer, id(module)] for layer, own in sorted(roster.owners.items()) for module in own]
            for roster in rosters
        }
        ends = accumulate(len(own) for own in self.members.values())
        self.gates = {
            key: range(end - len(own), end) for (key, own), end in zip(self.members.items(), ends, strict=True)
        }

    def speakers(self, roster: Roster, said_RS: np.ndarray) -> list[str | None]:
        """Return for each row the module of the largest weight, averaged over its layers, or None."""
        names = [module.name for _, own in sorted(roster.owners.items()) for module in own]
        own_RM = said_RS[:, self.members[id(roster)]]
        modules = [module.name for module in roster.modules]
        means_RN = np.stack([own_RM[:, [name == other for other in names]].mean(1) for name in modules], 1)
        best_R = means_RN.argmax(1)
        return [modules[best] if means[best] > 0 else None for best, means in zip(best_R, means_RN, strict=True)]


class PackedModel:
    """Holds the arrays that the kernel reads (`Weights` in `compiled/abi.py`).

    Attributes:
        positions: for how many positions there are angles.
        places: of the arrays, in the kernel's order (see `kernels/numba/launch.py`).
        nbytes: memory of the matrices.
    """

    def __init__(self, model: DeepSeekModel) -> None:
        config, layers = model.config, len(model.layers)
        assert isinstance(model.positions, Rope)
        self.hidden, self.vocabulary = config.hidden_size, config.vocab_size
        self.heads, self.groups, self.width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.inner, self.layers = -(-config.intermediate_size // GROUP), layers
        packed = [matrix for block in model.layers for matrix in _pack_block(block)]
        if model.lm_head.weight is not model.embed_tokens.weight:
            packed.append(pack([matrix_of(model.lm_head)]))
        packed.append(pack([matrix_of(model.embed_tokens)]))
        matrices = in_place(*packed)
        self.nbytes = sum(matrix.nbytes for matrix in matrices)
        addresses = [matrix.ctypes.data for matrix in matrices]
        sizes = [layers, self.hidden, self.heads, self.groups, self.width, self.inner, self.vocabulary]
        whole = [sizes, *(addresses[kind : 4 * layers : 4] for kind in range(4)), addresses[4 * layers :][:1]]
        self._matrices, self._rope = matrices, model.positions
        self._arrays = [*(np.array(part, np.int64) for part in (*whole, addresses[-1:])), *_small_arrays(model)]
        self._eps = np.array([config.rms_norm_eps], np.float32)
        self.positions, self.places = 0, list[int]()
        self.reach(1024)

    def reach(self, positions: int) -> None:
        """See to it that there are angles for so many positions."""
        if positions <= self.positions:
            return
        self.positions = max(positions, 2 * self.positions)
        rotation: Any = self._rope.prepare(torch.arange(self.positions)[None], torch.float32)
        half = self.width // 2
        self._tables = [np.ascontiguousarray(table[0, 0, :, :half].numpy()) for table in (rotation.cos, rotation.sin)]
        self.places = placed(*self._arrays, *self._tables, self._eps)


def matrix_of(layer: nn.Module) -> Int8Matrix:
    """Return the rounded weights of a linear layer or an embedding."""
    stored = getattr(layer, "int8", None)  # where the checkpoint holds 8-bit weights (see `model/int8.py`)
    if isinstance(stored, Int8Matrix):
        return stored
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    return quantize(weight.detach())


def _pack_block(block: nn.Module) -> list[np.ndarray]:
    """Return the packed matrices of a layer: queries, keys and values; output; gate and up; down."""
    attention, ffn = block.attention, block.feed_forward
    assert isinstance(attention, FullAttention) and isinstance(ffn, SwiGLU)
    parts = [matrix_of(part) for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
    joined = Int8Matrix(
        torch.cat([part.values for part in parts]), torch.cat([part.scales for part in parts]), parts[0].width
    )
    return [
        pack([joined]),
        pack([matrix_of(attention.o_proj)]),
        pack([matrix_of(ffn.gate_proj), matrix_of(ffn.up_proj)]),
        pack([matrix_of(ffn.down_proj)]),
    ]


def _small_arrays(model: DeepSeekModel) -> list[np.ndarray]:
    """Return the norms, the norms of heads, both biases and the windows of all layers."""
    blocks: list[Any] = list(model.layers)
    norms = [norm.weight for block in blocks for norm in (block.attention_norm, block.feed_forward_norm)]
    attentions = [block.attention for block in blocks]
    heads = [[own.q_norm.weight, own.k_norm.weight] for own in attentions if own.normed]
    biases = [[own.q_proj, own.k_proj, own.v_proj] for own in attentions]
    window = model.config.sliding_window or 0
    return [
        _floats(torch.stack([*norms, model.norm.weight])),
        _floats(torch.stack([torch.stack(pair) for pair in heads]) if heads else torch.zeros(len(blocks), 2, 0)),
        _floats(torch.stack([torch.cat([_bias(part) for part in parts]) for parts in biases])),
        _floats(torch.stack([_bias(own.o_proj) for own in attentions])),
        np.array([window if own.windowed else 0 for own in attentions], np.int64),
    ]


def _bias(layer: nn.Linear) -> torch.Tensor:
    return layer.bias if layer.bias is not None else torch.zeros(layer.out_features, dtype=torch.float32)


def _floats(tensor: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().float().numpy())
