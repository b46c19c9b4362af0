"""Quantised and packed weights of native experts, and the rules of their routers."""

import numpy as np

from deepseek.compiled.abi import ROUTED
from deepseek.compiled.packing import (
    MatrixSource,
    bits_of,
    matrix_source,
    pack_matrices,
    quantised_source,
    tagged_address,
)
from deepseek.kernels.int8_layout import GROUP
from deepseek.kernels.numba.buffers import Value
from deepseek.model.moe.experts import Experts
from deepseek.model.moe.layer import MoELayer
from deepseek.model.moe.router import SCORES, DynamicRouter, Router, TopKRouter
from deepseek.model.quantised import kept_matrix
from deepseek.model.transformer import DeepSeekModel


class PackedPool:
    """The packed weights of a pool of routed experts.

    Args:
        pool: the pool.

    Attributes:
        gate_up, down: addresses of each expert's projections.
        nbytes: bytes of the packed matrices.
    """

    def __init__(self, pool: Experts) -> None:
        experts = range(len(pool.gate_up_proj))
        sources: dict[tuple[str, int], list[MatrixSource]] = {}
        for expert in experts:
            gate_up = _source(pool, "gate_up_proj", expert)
            width = gate_up.outputs // 2
            sources["gate_up", expert] = [gate_up.part(0, width), gate_up.part(width, 2 * width)]
            sources["down", expert] = [_source(pool, "down_proj", expert)]
        self._matrices = pack_matrices(sources)  # owns the memory
        places = {
            key: tagged_address(self._matrices[key], bits_of(sources[key])) for key in sources
        }
        self.gate_up = [places["gate_up", expert] for expert in experts]
        self.down = [places["down", expert] for expert in experts]
        self.nbytes = sum(part.nbytes for part in self._matrices.values())


def _source(pool: Experts, name: str, expert: int) -> MatrixSource:
    """Return a matrix of an expert, quantised as the checkpoint stores it if it is quantised."""
    matrix = kept_matrix(pool, name, expert)
    if matrix is not None:
        return quantised_source(matrix)
    return matrix_source(getattr(pool, name)[expert].detach())


class NativeExperts:
    """Routers and packed routed experts of all layers; a shared pool is packed once.

    Args:
        model: a model that the compiled runner supports.

    Attributes:
        extents: numbers of experts and of slots under their names in `compiled/abi.py`; 0 for a
            dense model.
        inner: groups of 64 hidden values of a routed expert.
        arguments: arguments of the step (`ROUTED` there).
        nbytes: bytes of the packed matrices.
    """

    def __init__(self, model: DeepSeekModel) -> None:
        mixtures = {
            layer: block.feed_forward
            for layer, block in enumerate(model.layers)
            if isinstance(block.feed_forward, MoELayer)
        }
        pools = {id(mixture.pool): mixture.pool for mixture in mixtures.values()}
        self._pools = {key: PackedPool(pool) for key, pool in pools.items()}
        self.nbytes = sum(pool.nbytes for pool in self._pools.values())
        self.inner = -(-model.config.expert_dim // GROUP)
        numbers = rules(next(iter(mixtures.values())).router if mixtures else None)
        experts = model.config.num_experts if mixtures else 0
        self.extents = {"experts": experts, "slots": numbers["slots"]}
        sizes = {
            "layers": len(model.layers),
            "experts": experts,
            "hidden": model.config.hidden_size,
        }
        arrays = ROUTED.zeros(sizes)
        for layer, mixture in mixtures.items():
            self._fill(arrays, layer, mixture)
        values: dict[str, Value] = {**arrays, **numbers, "experts": experts, "inner": self.inner}
        self.arguments = ROUTED.arguments(values, sizes)

    def _fill(self, arrays: dict[str, np.ndarray], layer: int, mixture: MoELayer) -> None:
        """Set a layer's entries in the arrays of `ROUTED`."""
        pool = self._pools[id(mixture.pool)]
        router = mixture.router
        arrays["sparse"][layer] = 1
        arrays["router"][layer] = router.weight.detach().float().numpy()
        arrays["bias"][layer] = router.balance.bias.numpy()
        arrays["temperature"][layer] = float(router.balance.temperature)
        arrays["gate_up"][layer] = pool.gate_up
        arrays["down"][layer] = pool.down
        if isinstance(router, DynamicRouter):
            arrays["threshold"][:] = router.threshold
        elif isinstance(router, TopKRouter):
            arrays["scale"][:] = router.scale


def rules(router: Router | None) -> dict[str, int]:
    """Return the numbers of `ROUTED` that define the routing, the same for all layers.

    Args:
        router: the router of a layer; None: a dense model.
    """
    numbers = {
        "slots": 0,
        "dynamic": 0,
        "candidates": 0,
        "min_experts": 0,
        "sigmoid": 0,
        "renormalize": 0,
        "groups": 1,
        "max_groups": 1,
    }
    if isinstance(router, DynamicRouter):
        numbers |= {
            "slots": router.max_experts,
            "dynamic": 1,
            "candidates": router.candidates,
            "min_experts": router.min_experts,
        }
    elif isinstance(router, TopKRouter):
        numbers |= {
            "slots": router.top_k,
            "sigmoid": int(router.score is SCORES["sigmoid"]),
            "renormalize": int(router.renormalize),
            "groups": router.groups,
            "max_groups": router.max_groups,
        }
    return numbers
