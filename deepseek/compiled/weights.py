"""Quantised and packed weights for the compiled step: those of a model and of plugged experts."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import accumulate, chain
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import nn

from deepseek.compiled.abi import SITES, WEIGHTS
from deepseek.compiled.native_weights import NativeExperts
from deepseek.compiled.positions import angles, bias_arrays, rotations
from deepseek.compiled.small_arrays import numbers, small_arrays
from deepseek.kernels.int8 import GROUP, Int8Matrix, pack, quantize, row_bytes
from deepseek.kernels.numba.buffers import aligned
from deepseek.model.attention.full import FullAttention
from deepseek.model.experts.armed import Roster
from deepseek.model.experts.module import ExpertModule
from deepseek.model.feed_forward import SwiGLU
from deepseek.model.moe.layer import MoELayer
from deepseek.model.positions.dynamic import CONTEXTS, DynamicBias
from deepseek.model.transformer import DeepSeekModel

# Number of positions whose rotary angles are computed when a model is packed; others on demand.
FIRST_POSITIONS = 1024

NUMBERS = {buffer.name for buffer in WEIGHTS.buffers if buffer.is_number}

Key = TypeVar("Key", bound=Hashable)


class PackedLayer(NamedTuple):
    """An expert's weights at one layer.

    Attributes:
        gate_up, down: packed projections.
        inner: width of the hidden layer in groups of 64 values.
    """

    gate_up: np.ndarray
    down: np.ndarray
    inner: int


Packed = dict[int, PackedLayer]
"""Layer -> packed weights of an expert."""


def contiguous(matrices: Mapping[Key, np.ndarray]) -> dict[Key, np.ndarray]:
    """Return copies of packed matrices under the same keys, one after the other in one stretch of
    memory.
    """
    memory = aligned(sum(matrix.nbytes for matrix in matrices.values()))
    copies = {}
    start = 0
    for key, matrix in matrices.items():
        copies[key] = memory[start : start + matrix.nbytes]
        copies[key][:] = matrix.reshape(-1)
        start += matrix.nbytes
    return copies


def pack_module(module: ExpertModule) -> Packed:
    """Quantise and pack every layer of an expert."""
    packed = {}
    for layer in module.layers:
        part = module.at(layer)
        gate, up = (quantize(half) for half in part.gate_up_proj.detach().chunk(2))
        down = quantize(part.down_proj.detach())
        matrices = contiguous({"gate_up": pack([gate, up]), "down": pack([down])})
        packed[layer] = PackedLayer(
            matrices["gate_up"], matrices["down"], -(-module.width // GROUP)
        )
    return packed


def _gates(roster: Roster, hidden: int) -> np.ndarray:
    """Return the gates `[members, 2, D + 1]` of a roster, ordered by layer; zeros if its experts
    are forced.
    """
    if roster.banks is None:
        return np.zeros((sum(map(len, roster.owners.values())), 2, hidden + 1), np.float32)
    rows = []
    for _, bank in sorted(roster.banks.items()):
        # Rows: the detecting ones of all members, then the contrasting ones.
        affine = torch.cat([bank.weight, bank.bias[:, None]], 1)
        rows.append(affine.unflatten(0, (2, -1)).transpose(0, 1))
    return torch.cat(rows).cpu().numpy()


def _owners(roster: Roster) -> list[tuple[int, ExpertModule]]:
    """Return the layer and the expert of each member of a roster, ordered by layer."""
    return [
        (layer, module) for layer, modules in sorted(roster.owners.items()) for module in modules
    ]


class Sites:
    """The sites of all experts in a batch, ordered by layer; a site is an expert at a layer.

    Args:
        rosters: the rosters of the batch, all different.
        packed: returns the packed weights of an expert.
        layers: number of layers of the model.
        hidden: width D of the residual stream.

    Attributes:
        count: number of sites.
        most_at_one_layer: maximum number of sites at a layer.
        arguments: arguments of the step (`SITES` in `compiled/abi.py`).
        row_bytes: for each site, bytes of one row of quantised hidden values.
        members: id of a roster -> sites of its members.
        gates: id of a roster -> rows of its members in the array of gates.
    """

    def __init__(
        self,
        rosters: Sequence[Roster],
        packed: Callable[[ExpertModule], Packed],
        layers: int,
        hidden: int,
    ) -> None:
        # The references keep the rosters alive, so that no later roster can reuse one of their ids.
        self.rosters = tuple(rosters)
        owners = {id(roster): _owners(roster) for roster in rosters}
        modules = {
            (layer, id(module)): module for layer, module in chain.from_iterable(owners.values())
        }
        # Ordered by digest, as in a roster: the order of summation, and so the bits of the result,
        # must not depend on the other rosters of the batch.
        keys = sorted(modules, key=lambda key: (key[0], modules[key].digest, key[1]))
        site_of = {key: site for site, key in enumerate(keys)}
        self._parts = [packed(modules[key])[key[0]] for key in keys]
        self.count = len(keys)
        at_layer = np.bincount([layer for layer, _ in keys], minlength=layers)[:layers]
        self.most_at_one_layer = int(at_layer.max(initial=0))
        self.row_bytes = [row_bytes(part.inner) for part in self._parts]
        self.members = {
            roster: [site_of[layer, id(module)] for layer, module in members]
            for roster, members in owners.items()
        }
        ends = accumulate(len(members) for members in self.members.values())
        self.gates = {
            roster: range(end - len(members), end)
            for (roster, members), end in zip(self.members.items(), ends, strict=True)
        }
        no_gates = np.zeros((0, 2, hidden + 1), np.float32)
        gates = np.concatenate([no_gates, *(_gates(roster, hidden) for roster in rosters)])
        decays = _decays(rosters)
        self.arguments = SITES.arguments(
            {
                "first_site": [0, *at_layer.cumsum().tolist()],
                "gate_up": [part.gate_up.ctypes.data for part in self._parts],
                "down": [part.down.ctypes.data for part in self._parts],
                "inner": [part.inner for part in self._parts],
                "gates": gates,
                "decay": np.array([decays.get(key, 0.0) for key in keys], np.float32),
            },
            {"layers": layers, "sites": self.count, "gates": len(gates), "hidden": hidden},
        )

    def speakers(self, roster: Roster, weights_RS: np.ndarray) -> list[str | None]:
        """Return, for each row, the expert whose weight, averaged over its layers, is largest.

        Args:
            roster: the roster of the rows' sequence.
            weights_RS: weights of all sites at each row.

        Returns:
            The experts' names; None where no expert fired.
        """
        owners = [module.name for _, module in _owners(roster)]
        modules = [module.name for module in roster.modules]
        weights_RM = weights_RS[:, self.members[id(roster)]]
        means_RN = np.stack(
            [weights_RM[:, [name == owner for owner in owners]].mean(1) for name in modules], 1
        )
        best_R = means_RN.argmax(1)
        return [
            modules[best] if means[best] > 0 else None
            for best, means in zip(best_R, means_RN, strict=True)
        ]


def _decays(rosters: Sequence[Roster]) -> dict[tuple[int, int], float]:
    """Return the decay of the running gate sums, by layer and id of the expert.

    Forced experts have no gate and are left out.
    """
    decays: dict[tuple[int, int], float] = {}
    for roster in rosters:
        for layer, bank in (roster.banks or {}).items():
            keys = [(layer, id(module)) for module in roster.owners[layer]]
            decays |= zip(keys, bank.decay.tolist(), strict=True)
    return decays


class PackedModel:
    """Quantised and packed weights of a model.

    Args:
        model: a model that the compiled runner supports.

    Attributes:
        extents: sizes of the model, under their names in `compiled/abi.py`.
        arguments: arguments of the step (`WEIGHTS` there).
        native: routers and routed experts; without any for a dense model.
        positions: number of positions with precomputed rotary angles.
        nbytes: bytes of the packed matrices.
    """

    def __init__(self, model: DeepSeekModel) -> None:
        self._model = model
        self.native = NativeExperts(model)
        self.extents = _extents(model) | self.native.extents
        matrices = contiguous(_pack_model(model))
        self._matrices = matrices
        self.nbytes = self.native.nbytes + sum(matrix.nbytes for matrix in matrices.values())
        layers = range(len(model.layers))
        no_matrix = np.zeros(1, np.uint8)  # layers without shared experts
        addresses = {
            name: [matrices.get((name, layer), no_matrix).ctypes.data for layer in layers]
            for name in ("qkv", "out", "gate_up", "down")
        }
        embed_tokens = matrices["embed_tokens", 0]
        self._values: dict[str, Any] = addresses | small_arrays(model) | bias_arrays(model)
        self._values["signals"] = [
            matrices["signals", layer].ctypes.data if ("signals", layer) in matrices else 0
            for layer in layers
        ]
        self._values["embed_tokens"] = embed_tokens.ctypes.data
        self._values["lm_head"] = matrices.get(("lm_head", 0), embed_tokens).ctypes.data
        self._values["inner"] = [_inner(block) for block in model.layers]
        self._values |= numbers(model)
        self._values |= {name: size for name, size in self.extents.items() if name in NUMBERS}
        self.positions = 0
        self.reach(FIRST_POSITIONS)

    def reach(self, positions: int) -> None:
        """Precompute the rotary angles of at least `positions` positions."""
        if positions <= self.positions:
            return
        self.positions = max(positions, 2 * self.positions)
        self.extents["positions"] = self.positions
        values = self._values | angles(self._model, self.positions)
        self.arguments = WEIGHTS.arguments(values, self.extents)


def _extents(model: DeepSeekModel) -> dict[str, int]:
    """Return the sizes of a model under their names in `compiled/abi.py`."""
    config = model.config
    layers = len(model.layers)
    heads = config.num_attention_heads
    groups = config.num_key_value_heads
    width = config.head_dim
    dynamic = config.positional_encoding == "dpe"
    return {
        "layers": layers,
        "hidden": config.hidden_size,
        "heads": heads,
        "groups": groups,
        "width": width,
        "page_width": -(-width // GROUP) * GROUP,
        "inner": max(_inner(block) for block in model.layers),
        "vocabulary": config.vocab_size,
        "norms": 2 * layers + 1,
        "post_norms": 2 * layers if config.post_norms else 0,
        "update_width": config.hidden_size if config.post_norms else 0,
        "attended_width": -(-heads * width // GROUP) * GROUP if width % GROUP else 0,
        "rotations": rotations(model),
        "joint_norm": int(config.qk_norm == "width"),
        "head_norm_width": {"none": 0, "head": width, "width": heads * width}[config.qk_norm],
        "qkv_width": (heads + 2 * groups) * width,
        "half_width": width // 2,
        "alibi_heads": heads if config.positional_encoding == "alibi" else 0,
        "bias_heads": heads if dynamic else 0,
        "contexts": CONTEXTS,
        "signals": CONTEXTS + heads if dynamic else 0,
        "group_heads": heads // groups,
    }


def _pack_model(model: DeepSeekModel) -> dict[tuple[str, int], np.ndarray]:
    """Return the packed matrices by name and layer, in the order in which a step reads them.

    Head and embedding have layer 0. A head that shares the embedding's weights is not packed again.
    """
    packed = {}
    for layer, block in enumerate(model.layers):
        for name, matrix in _pack_block(block).items():
            packed[name, layer] = matrix
    if model.lm_head.weight is not model.embed_tokens.weight:
        packed["lm_head", 0] = pack([matrix_of(model.lm_head)])
    packed["embed_tokens", 0] = pack([matrix_of(model.embed_tokens)])
    return packed


def matrix_of(layer: nn.Module) -> Int8Matrix:
    """Return the quantised weights of a linear layer or an embedding."""
    # Checkpoints with 8-bit weights provide the quantised matrix (see `model/int8.py`).
    stored = getattr(layer, "int8", None)
    if isinstance(stored, Int8Matrix):
        return stored
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    return quantize(weight.detach())


def _pack_block(block: nn.Module) -> dict[str, np.ndarray]:
    """Return the packed matrices of a layer."""
    attention = block.attention
    ffn = _dense_part(block)
    assert isinstance(attention, FullAttention)
    packed = {
        "qkv": _side_by_side(attention.q_proj, attention.k_proj, attention.v_proj),
        "out": pack([matrix_of(attention.o_proj)]),
    }
    if isinstance(attention.score_bias, DynamicBias):
        packed["signals"] = _side_by_side(attention.score_bias.gate, attention.score_bias.forget)
    if ffn is not None:
        packed["gate_up"] = pack([matrix_of(ffn.gate_proj), matrix_of(ffn.up_proj)])
        packed["down"] = pack([matrix_of(ffn.down_proj)])
    return packed


def _dense_part(block: nn.Module) -> SwiGLU | None:
    """Return the network that computes every row at a layer: its dense network, or its shared
    experts, if any.
    """
    ffn = block.feed_forward
    dense = ffn.shared_experts if isinstance(ffn, MoELayer) else ffn
    assert dense is None or isinstance(dense, SwiGLU)
    return dense


def _inner(block: nn.Module) -> int:
    """Return the groups of 64 hidden values of that network; 0 if there is none."""
    dense = _dense_part(block)
    return 0 if dense is None else -(-dense.down_proj.in_features // GROUP)


def _side_by_side(*layers: nn.Module) -> np.ndarray:
    """Return the packed matrix of linear layers that read the same input."""
    parts = [matrix_of(layer) for layer in layers]
    values = torch.cat([part.values for part in parts])
    scales = torch.cat([part.scales for part in parts])
    return pack([Int8Matrix(values, scales, parts[0].width)])
