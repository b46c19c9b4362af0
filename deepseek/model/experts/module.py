"""An expert module: feed-forward networks beside those of some layers of a frozen base."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from deepseek.errors import ConfigError
from deepseek.model.experts.relevance import Relevance
from deepseek.model.feed_forward import SwiGLU
from deepseek.packs.manifest import DTYPES, MOMENTS, BaseDescription, GateSettings, Manifest, Metric
from deepseek.packs.pack import ExpertPack, check_finite

DTYPE_NAMES: dict[torch.dtype, Any] = {dtype: name for name, dtype in DTYPES.items()}


class ExpertLayer(nn.Module):
    """A SwiGLU with fused gate and up projection `[2F, D]`, zero at the start.

    It has no norm scale of its own: the columns of `gate_up_proj` already scale its input.
    """

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(2 * width, hidden_size))
        self.down_proj = nn.Parameter(torch.zeros(hidden_size, width))
        nn.init.normal_(self.gate_up_proj, std=hidden_size**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., D]` to `[..., D]`."""
        gate, up = linear(x, self.gate_up_proj).chunk(2, dim=-1)
        return linear(silu(gate) * up, self.down_proj)

    @torch.no_grad()
    def copy_rows(self, ffn: SwiGLU, seed: int) -> None:
        """Start from rows of the base's own feed-forward network: all, or a sample if this is
        narrower.
        """
        width = self.down_proj.shape[1]
        available = ffn.gate_proj.out_features
        rows = (
            torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:width]
            .sort()
            .values
        )
        rows = rows.to(ffn.gate_proj.weight.device)
        self.gate_up_proj.copy_(torch.cat([ffn.gate_proj.weight[rows], ffn.up_proj.weight[rows]]))


class ExpertModule(nn.Module):
    """An expert: one `ExpertLayer` of width F at each of `layers`, and the gates that say where it
    speaks.

    Attributes:
        ffn: the expert layers, keyed by layer index.
        gates: layer -> the detecting row `[D+1]` in fp32 (see `model/experts/gate.py`). It is
            computed, not trained, and so no parameter; zeros, the start value, never fire.
        moments: layer -> `[MOMENTS, D]` in fp32, what the module's own text looks like to its gate
            (`gate.contrasts`).
        relevance: what the words of a text say about the module's domain (see
            `model/experts/relevance.py`); None: nothing is known, and every text counts as
            relevant.
        settings: how gates and relevance were calibrated.
        digest: of the content of the pack that it came from; "" for a module made in memory.
    """

    def __init__(self, name: str, layers: Sequence[int], hidden_size: int, width: int) -> None:
        super().__init__()
        self.name = name
        self.layers = tuple(sorted(layers))
        self.hidden_size = hidden_size
        self.width = width
        self.ffn = nn.ModuleDict(
            {str(layer): ExpertLayer(hidden_size, width) for layer in self.layers}
        )
        self.gates = {layer: torch.zeros(hidden_size + 1) for layer in self.layers}
        self.moments = {layer: torch.zeros(MOMENTS, hidden_size) for layer in self.layers}
        self.relevance: Relevance | None = None
        self.settings = GateSettings()
        self.digest = ""

    @staticmethod
    def beside(
        blocks: Any, name: str, layers: Sequence[int], width: int, *, seed: int = 0
    ) -> "ExpertModule":
        """Return a new module for the `blocks` of a model (`model.layers`), on their device, in
        fp32.

        Its inner projections start from rows of the block's dense feed-forward network where that
        has enough of them, else random; its output is zero either way. Raises `ConfigError` if a
        layer does not exist.
        """
        for layer in layers:
            if not 0 <= layer < len(blocks):
                raise ConfigError(
                    f"layer {layer} does not exist; the model has layers 0 to {len(blocks) - 1}."
                )
        weight = blocks[0].feed_forward_norm.weight
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = ExpertModule(name, layers, weight.shape[0], width)
        for layer in module.layers:
            ffn = blocks[layer].feed_forward
            if isinstance(ffn, SwiGLU) and width <= ffn.gate_proj.out_features:
                module.at(layer).copy_rows(ffn, seed + layer)
        return module.to(weight.device)

    def at(self, layer: int) -> ExpertLayer:
        """Return the expert layer at base layer `layer`."""
        part = self.ffn[str(layer)]
        assert isinstance(part, ExpertLayer)
        return part

    def forward(self, layer: int, x: Tensor) -> Tensor:
        """Return what the module adds at base layer `layer` to gate inputs `[..., D]`."""
        y: Tensor = self.ffn[str(layer)](x)
        return y

    def set_gate(
        self,
        layer: int,
        weight: Tensor,
        threshold: float = 0.0,
        scale: float = 1.0,
        moments: Tensor | None = None,
    ) -> None:
        """Set the gate of `layer`: detect = (weight . [x; 1] - threshold) / scale; without
        `moments` they stay.
        """
        self.gates[layer] = weight.detach().float().cpu() / scale
        self.gates[layer][-1] -= threshold / scale
        if moments is not None:
            self.moments[layer] = moments.detach().float().cpu()

    def to_pack(
        self,
        base: BaseDescription,
        licence: str,
        *,
        domain: str = "",
        data: Sequence[str] = (),
        commit: str | None = None,
        metrics: dict[str, Metric] | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> ExpertPack:
        """Return the module with its papers (see `Manifest`), its weights rounded to `dtype`."""
        manifest = Manifest(
            name=self.name,
            domain=domain,
            base=base,
            layers=self.layers,
            width=self.width,
            dtype=DTYPE_NAMES[dtype],
            gate=self.settings,
            data=tuple(data),
            licence=licence,
            commit=commit,
            metrics=metrics or {},
            vocabulary=0 if self.relevance is None else len(self.relevance.table_V),
        )
        tensors = {
            name: tensor.detach().to("cpu", dtype, copy=True)
            for name, tensor in self.state_dict().items()
        }
        tensors |= {f"gate.{layer}": gate.clone() for layer, gate in self.gates.items()}
        tensors |= {f"moments.{layer}": moments.clone() for layer, moments in self.moments.items()}
        if self.relevance is not None:
            tensors["relevance"] = self.relevance.table_V.half()
        return ExpertPack.seal(manifest, tensors)

    @staticmethod
    def from_pack(
        pack: ExpertPack, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> "ExpertModule":
        """Return the module in a checked pack, without gradients; in the pack's own dtype if none
        is given.

        Raises `PackError` if a weight is too large for `dtype`.
        """
        manifest = pack.manifest
        with torch.device("meta"):
            module = ExpertModule(
                manifest.name, manifest.layers, manifest.base.hidden_size, manifest.width
            )
        tensors = {
            name: tensor.to(device, dtype)
            for name, tensor in pack.tensors.items()
            if name.startswith("ffn.")
        }
        if dtype == torch.float16:  # the one dtype of a smaller range than a pack's own
            check_finite(tensors, "in the model's float16")
        module.load_state_dict(tensors, assign=True)
        module.gates = {layer: pack.tensors[f"gate.{layer}"] for layer in module.layers}
        module.moments = {layer: pack.tensors[f"moments.{layer}"] for layer in module.layers}
        module.settings = manifest.gate
        if "relevance" in pack.tensors:
            gate = manifest.gate
            table_V = pack.tensors["relevance"].float()
            module.relevance = Relevance(table_V, gate.relevance_threshold, gate.relevance_offset)
        module.digest = manifest.digest
        return module.requires_grad_(False).eval()
