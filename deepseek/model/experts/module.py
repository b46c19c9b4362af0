"""An expert module: feed-forward networks in parallel to those of a frozen base model."""

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from deepseek import checks
from deepseek.errors import ConfigError, shown
from deepseek.model.experts.relevance import Relevance
from deepseek.model.feed_forward import SwiGLU
from deepseek.packs.manifest import (
    MOMENTS,
    BaseDescription,
    GateSettings,
    Manifest,
    Metric,
    explain,
)
from deepseek.packs.pack import ExpertPack, check_finite
from deepseek.packs.tensors import DTYPES

DTYPE_NAMES: dict[torch.dtype, Any] = {dtype: name for name, dtype in DTYPES.items()}


class ExpertLayer(nn.Module):
    """A SwiGLU with a fused gate and up projection `[2F, D]` whose output is initially zero.

    It has no norm weight, because the columns of `gate_up_proj` can scale its input as well.
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
    def copy_rows(self, gate_FD: Tensor, up_FD: Tensor, seed: int) -> None:
        """Initialise from the base's feed-forward network: all its rows, or a random sample.

        Args:
            gate_FD: gate projection of the base layer.
            up_FD: up projection of the base layer.
            seed: seed of the sample.
        """
        width = self.down_proj.shape[1]
        rows = (
            torch.randperm(len(gate_FD), generator=torch.Generator().manual_seed(seed))[:width]
            .sort()
            .values
        )
        rows = rows.to(gate_FD.device)
        self.gate_up_proj.copy_(torch.cat([gate_FD[rows], up_FD[rows]]))


class ExpertModule(nn.Module):
    """An expert: one `ExpertLayer` of width F at each of `layers`, and their gates.

    Attributes:
        ffn: the expert layers, keyed by layer index.
        gates: layer -> detection row `[D+1]` in fp32 (see `model/experts/gate.py`). It is computed
            in closed form, not trained, so it is no parameter. The initial zeros never fire.
        moments: layer -> `[MOMENTS, D]` in fp32, moments of the gate inputs on the module's
            training text (see `gate.contrasts`).
        relevance: log-odds table of the module's domain (see `model/experts/relevance.py`); None:
            every text counts as relevant.
        settings: calibration settings of gates and relevance.
        digest: content digest of the pack that the module came from; "" if created in memory.

    Raises:
        ConfigError: the name is no text, a layer or a size is no positive whole number, or a layer
            is repeated.
    """

    def __init__(self, name: str, layers: Sequence[int], hidden_size: int, width: int) -> None:
        super().__init__()
        self.name = checks.text("name", name)
        self.layers = tuple(sorted(checks.layers("layers", layers, checks.MAX_SIZE)))
        if not self.layers or len(set(self.layers)) < len(self.layers):
            raise ConfigError(f"layers={self.layers} must name at least one layer, each once.")
        self.hidden_size = hidden_size = checks.whole("hidden_size", hidden_size, least=1)
        self.width = width = checks.whole("width", width, least=1)
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
        """Return a new fp32 module for a model, on the model's device.

        The gate and up projections are copied from the block's dense feed-forward network if that
        has at least `width` rows, and are random otherwise. The output is initially zero.

        Args:
            blocks: the model's layers (`model.layers`).
            name: name of the module.
            layers: indices of the layers that get an expert layer.
            width: width F of the expert layers.
            seed: seed of the initial weights.

        Raises:
            ConfigError: a layer does not exist.
        """
        layers = checks.layers("layers", layers, len(blocks))
        seed = checks.whole("seed", seed, least=0, most=checks.MAX_SEED)
        weight = blocks[0].feed_forward_norm.weight
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = ExpertModule(name, layers, weight.shape[0], width)
        for layer in module.layers:
            ffn = blocks[layer].feed_forward
            if isinstance(ffn, SwiGLU) and width <= ffn.gate_proj.out_features:
                matrices = ffn.gate_proj.weight, ffn.up_proj.weight
                module.at(layer).copy_rows(*matrices, seed + layer)
        return module.to(weight.device)

    def at(self, layer: int) -> ExpertLayer:
        """Return the expert layer at base layer `layer`."""
        part = self.ffn[str(layer)]
        assert isinstance(part, ExpertLayer)
        return part

    def forward(self, layer: int, x: Tensor) -> Tensor:
        """Return the module's output at base layer `layer` for gate inputs `[..., D]`."""
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
        """Set the gate of a layer to detect = (weight . [x; 1] - threshold) / scale.

        Args:
            layer: base layer.
            weight: row `[D+1]`, the constant term last.
            threshold: score at which the gate starts to fire.
            scale: difference between the domain's median score and the threshold.
            moments: moments `[MOMENTS, D]` of the domain; None: keep the present ones.

        Raises:
            ConfigError: the module has no such layer, a shape or a value is wrong.
        """
        if layer not in self.layers:
            raise ConfigError(f"layer={shown(layer)} must be one of {self.layers}.")
        given: dict[str, tuple[Tensor, tuple[int, ...], str]] = {
            "weight": (weight, (self.hidden_size + 1,), "[width + 1]")
        }
        if moments is not None:
            given["moments"] = (moments, (MOMENTS, self.hidden_size), f"[{MOMENTS}, width]")
        for name, (part, expected, axes) in given.items():
            checks.tensor(name, part, "real")
            checks.shape(name, part, expected, axes)
            checks.finite(name, part)
        checks.number("threshold", threshold)
        checks.number("scale", scale, above=0)
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
        """Return the module as an unsigned pack.

        Args:
            base: the base model that the module was trained beside.
            licence: SPDX expression.
            domain: short description of the domain.
            data: SHA-256 digests of the training data.
            commit: commit of the repository that the module was trained on; None: no repository.
            metrics: name of a held-out text -> loss before and after, in nats per token.
            dtype: dtype of the stored weights.

        Raises:
            ConfigError: a value is none that a manifest may hold.
        """
        if dtype not in DTYPE_NAMES:
            valid = ", ".join(DTYPES)
            raise ConfigError(f"dtype={shown(dtype)} must be one of {valid}.")
        try:
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
        except ValidationError as error:
            raise ConfigError(f"The pack cannot be written, {explain(error)}.") from None
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
        """Return the module of a checked pack, frozen and in eval mode.

        Args:
            pack: a pack that passed `check_pack` or `read_pack`.
            dtype: dtype of the weights; None: the pack's.
            device: device of the weights; None: the CPU.

        Raises:
            PackError: a weight overflows `dtype`.
        """
        manifest = pack.manifest
        assert isinstance(manifest, Manifest)
        with torch.device("meta"):
            module = ExpertModule(
                manifest.name, manifest.layers, manifest.base.hidden_size, manifest.width
            )
        tensors = {
            name: tensor.to(device, dtype)
            for name, tensor in pack.tensors.items()
            if name.startswith("ffn.")
        }
        if dtype == torch.float16:  # the only dtype with a smaller range than a pack's
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
