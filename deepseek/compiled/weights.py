"""Quantised and packed weights for the compiled step: those of a model and of plugged experts."""

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from deepseek.compiled.abi import QUERIES, SITES, VECTOR_QUERIES, WEIGHTS
from deepseek.compiled.hashes import PackedHashes
from deepseek.compiled.native_weights import NativeExperts
from deepseek.compiled.packing import (
    MatrixSource,
    bits_of,
    concatenate,
    matrix_source,
    pack_matrices,
    source_of,
    tagged_address,
)
from deepseek.compiled.positions import angles, bias_arrays, rotations
from deepseek.compiled.small_arrays import numbers, small_arrays
from deepseek.kernels.int8 import packed_bytes
from deepseek.kernels.int8_layout import GROUP, row_bytes
from deepseek.kernels.numba import amx
from deepseek.model.attention.full import FullAttention
from deepseek.model.experts.armed import Roster
from deepseek.model.experts.module import ExpertModule
from deepseek.model.feed_forward import SwiGLU
from deepseek.model.moe.layer import MoELayer
from deepseek.model.positions.dynamic import CONTEXTS, DynamicBias
from deepseek.model.transformer import DeepSeekModel

# Number of positions whose rotary angles are computed when a model is packed; others on demand.
FIRST_POSITIONS = 1024

# Minimum number of queries in a unit of attention. Fewer leave vector units idle, and each unit
# reads the keys and values again.
FEWEST = 3
UNITS = 4  # units of attention for each thread that suffice for load balance

NUMBERS = {buffer.name for buffer in WEIGHTS.buffers if buffer.is_number}


class PackedLayer(NamedTuple):
    """An expert's weights at one layer.

    Attributes:
        gate_up, down: packed projections.
        inner: width of the hidden layer in groups of 64 values.
    """

    gate_up: np.ndarray
    down: np.ndarray
    inner: int


class Packed(dict[int, PackedLayer]):
    """Layer -> packed weights of an expert."""

    @property
    def nbytes(self) -> int:
        """Bytes of the packed matrices."""
        return sum(part.gate_up.nbytes + part.down.nbytes for part in self.values())


def module_bytes(module: ExpertModule) -> int:
    """Return the bytes of an expert's weights once they are packed."""
    gate_up = packed_bytes([module.width, module.width], module.hidden_size)
    return len(module.layers) * (gate_up + packed_bytes([module.hidden_size], module.width))


def pack_module(module: ExpertModule) -> Packed:
    """Quantise and pack every layer of an expert."""
    layers = Packed()
    for layer, part in zip(module.layers, module.read().in_order(), strict=True):
        gate, up = part.gate_up_proj.detach().chunk(2)
        matrices = pack_matrices(
            {
                "gate_up": [matrix_source(gate), matrix_source(up)],
                "down": [matrix_source(part.down_proj.detach())],
            }
        )
        layers[layer] = PackedLayer(
            matrices["gate_up"], matrices["down"], -(-module.width // GROUP)
        )
    return layers


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
        rosters: the distinct rosters of the batch. A holder of this object must drop it when one of
            them is freed, because another one may then get its id.
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

    def __init__(self, rosters: Sequence[Roster], layers: int, hidden: int) -> None:
        owners = {id(roster): _owners(roster) for roster in rosters}
        modules = {
            (layer, id(module)): module for layer, module in chain.from_iterable(owners.values())
        }
        # Ordered by digest, as in a roster: the order of summation, and so the bits of the result,
        # must not depend on the other rosters of the batch.
        keys = sorted(modules, key=lambda key: (key[0], modules[key].digest, key[1]))
        site_of = {key: site for site, key in enumerate(keys)}
        # The weight cache may evict stored experts that no running request uses; see `is_current`.
        self._packed = {module: module.form(pack_module) for module in modules.values()}
        parts = [self._packed[modules[key]][key[0]] for key in keys]
        self.count = len(keys)
        at_layer = np.bincount([layer for layer, _ in keys], minlength=layers)[:layers]
        self.most_at_one_layer = int(at_layer.max(initial=0))
        self.row_bytes = [row_bytes(part.inner) for part in parts]
        self.members = {
            roster: [site_of[layer, id(module)] for layer, module in members]
            for roster, members in owners.items()
        }
        self._shares = {id(roster): _means(roster) for roster in rosters}
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
                "gate_up": [tagged_address(part.gate_up, 8) for part in parts],
                "down": [tagged_address(part.down, 8) for part in parts],
                "inner": [part.inner for part in parts],
                "gates": gates,
                "decay": np.array([decays.get(key, 0.0) for key in keys], np.float32),
            },
            {"layers": layers, "sites": self.count, "gates": len(gates), "hidden": hidden},
        )

    @property
    def is_current(self) -> bool:
        """Whether the weights of all its experts are still in memory outside this object."""
        return all(
            module.made_form(pack_module) is packed for module, packed in self._packed.items()
        )

    def speakers(self, roster: Roster, weights_RS: np.ndarray) -> list[str | None]:
        """Return, for each row, the expert whose weight, averaged over its layers, is largest.

        Args:
            roster: the roster of the rows' sequence.
            weights_RS: weights of all sites at each row.

        Returns:
            The experts' names; None where no expert fired.
        """
        names, means_MN = self._shares[id(roster)]
        means_RN = weights_RS[:, self.members[id(roster)]] @ means_MN
        best_R = means_RN.argmax(1)
        return [
            names[best] if means[best] > 0 else None
            for best, means in zip(best_R, means_RN, strict=True)
        ]


def _means(roster: Roster) -> tuple[list[str], np.ndarray]:
    """Return the names of a roster's modules, and the matrix `[members, modules]` that averages the
    weights of the members of each module.
    """
    column = {id(module): index for index, module in enumerate(roster.modules)}
    owners = [column[id(module)] for _, module in _owners(roster)]
    means_MN = np.zeros((len(owners), len(column)), np.float32)
    means_MN[range(len(owners)), owners] = 1
    return [module.name for module in roster.modules], means_MN / means_MN.sum(0)


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
        native: routers and routed experts; empty for a dense model.
        hashes: hashes of LSH attention.
        positions: number of positions with precomputed rotary angles.
        nbytes: bytes of the packed matrices.
    """

    def __init__(self, model: DeepSeekModel) -> None:
        self._model = model
        self.native = NativeExperts(model)
        self.hashes = PackedHashes(model)
        self.extents = _extents(model) | self.hashes.extents | self.native.extents
        sources = matrices_of(model)
        self._matrices = pack_matrices(sources)  # owns the memory
        self.nbytes = self.native.nbytes + sum(part.nbytes for part in self._matrices.values())
        places = {
            key: tagged_address(self._matrices[key], bits_of(sources[key])) for key in sources
        }
        layers = range(len(model.layers))
        addresses = {  # 0: layers without shared experts, or without a dynamic bias
            name: [places.get((name, layer), 0) for layer in layers]
            for name in ("qkv", "signals", "out", "gate_up", "down")
        }
        self._values: dict[str, Any] = addresses | small_arrays(model) | bias_arrays(model)
        self._values["embed_tokens"] = places["embed_tokens", 0]
        self._values["lm_head"] = places.get(("lm_head", 0), places["embed_tokens", 0])
        self._values["inner"] = [_inner(block) for block in model.layers]
        self._values |= numbers(model) | self.hashes.values
        self._values |= {name: size for name, size in self.extents.items() if name in NUMBERS}
        self._values["tiles"] = int(amx.available())
        # A tile holds 32 elements of a head.
        self._values["tile_attention"] = int(amx.available() and model.config.head_dim % 32 == 0)
        self.positions = 0
        self.reach(FIRST_POSITIONS)

    def unit_queries(self, rows: int, threads: int) -> int:
        """Return the number of queries in a unit of attention.

        Args:
            rows: new tokens of the batch.
            threads: threads that share the units.
        """
        most = QUERIES if self._values["tile_attention"] else VECTOR_QUERIES
        return min(most, max(FEWEST, rows * self.extents["heads"] // (UNITS * threads)))

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


def matrices_of(model: DeepSeekModel) -> dict[tuple[str, int], list[MatrixSource]]:
    """Return the matrices to pack by name and layer, in the order in which a step reads them.

    Head and embedding have layer 0. A head that shares the embedding's weights is not packed again.
    """
    matrices = {}
    for layer, block in enumerate(model.layers):
        for name, sources in _matrices_of_block(block).items():
            matrices[name, layer] = sources
    if not model.config.tie_word_embeddings:
        matrices["lm_head", 0] = [source_of(model.lm_head)]
    matrices["embed_tokens", 0] = [source_of(model.embed_tokens)]
    return matrices


def _matrices_of_block(block: nn.Module) -> dict[str, list[MatrixSource]]:
    """Return the matrices of a layer."""
    attention = block.attention
    ffn = _dense_part(block)
    assert isinstance(attention, FullAttention)
    matrices = {
        "qkv": [_side_by_side(attention.q_proj, attention.k_proj, attention.v_proj)],
        "out": [source_of(attention.o_proj)],
    }
    if isinstance(attention.score_bias, DynamicBias):
        bias = attention.score_bias
        matrices["signals"] = [_side_by_side(bias.gate, bias.forget)]
    if ffn is not None:
        matrices["gate_up"] = [source_of(ffn.gate_proj), source_of(ffn.up_proj)]
        matrices["down"] = [source_of(ffn.down_proj)]
    return matrices


def _dense_part(block: nn.Module) -> SwiGLU | None:
    """Return the network that computes every row at a layer: its dense network, or its shared
    experts, if any.
    """
    ffn = block.feed_forward
    dense = ffn.shared_experts if isinstance(ffn, MoELayer) else ffn
    assert dense is None or isinstance(dense, SwiGLU)
    return dense


def _inner(block: nn.Module) -> int:
    """Return the groups of 64 hidden values of the network of `_dense_part`; 0 if there is none."""
    dense = _dense_part(block)
    return 0 if dense is None else -(-dense.down_proj.in_features // GROUP)


def _side_by_side(*layers: nn.Module) -> MatrixSource:
    """Return the matrix of linear layers that read the same input."""
    return concatenate([source_of(layer) for layer in layers])
