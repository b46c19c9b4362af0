"""An expert module: feed-forward networks in parallel to those of a frozen base model."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from deepseek import checks
from deepseek.errors import ConfigError, shown
from deepseek.model.experts.layer import ExpertLayer, ExpertLayers
from deepseek.model.experts.relevance import Relevance
from deepseek.model.experts.weight_cache import Form, WeightCache
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
from deepseek.packs.pack_file import PackFile
from deepseek.packs.tensors import DTYPES

DTYPE_NAMES: dict[torch.dtype, Any] = {dtype: name for name, dtype in DTYPES.items()}

F = TypeVar("F", bound=Form)


@dataclass(frozen=True)
class StoredWeights:
    """Where the weights of a module are stored if they are not kept in memory.

    Attributes:
        file: the pack.
        cache: keeps the weights that have been read.
        dtype, device: dtype and device of the weights once read.
    """

    file: PackFile
    cache: WeightCache
    dtype: torch.dtype
    device: torch.device


class ExpertModule(nn.Module):
    """An expert: one `ExpertLayer` of width F at each of `layers`, and their gates.

    Attributes:
        ffn: the expert layers, keyed by layer index; none if the weights are stored.
        stored: the file from which the weights are read when they are needed; None: they are in
            memory.
        gates: layer -> detection row `[D+1]` in fp32 (see `model/experts/gate.py`). It is computed
            in closed form, not trained, so it is not a parameter. The initial zeros never fire.
        moments: layer -> `[MOMENTS, D]` in fp32, moments of the gate inputs on the module's
            training text (see `gate.contrasts`).
        relevance: log-odds table of the module's domain (see `model/experts/relevance.py`); None:
            every text counts as relevant.
        settings: calibration settings of gates and relevance.
        digest: content digest of the pack that the module came from; "" if created in memory.

    Raises:
        ConfigError: the name is not a string, a size is not a positive integer, or `layers` is
            empty, has a repeated layer or an invalid index.
    """

    def __init__(self, name: str, layers: Sequence[int], hidden_size: int, width: int) -> None:
        super().__init__()
        self.name = checks.text("name", name)
        self.layers = tuple(sorted(checks.layers("layers", layers, checks.MAX_SIZE)))
        if not self.layers or len(set(self.layers)) < len(self.layers):
            raise ConfigError(f"layers={self.layers} must name at least one layer, each once.")
        self.hidden_size = hidden_size = checks.whole("hidden_size", hidden_size, least=1)
        self.width = width = checks.whole("width", width, least=1)
        self.ffn = ExpertLayers(
            {str(layer): ExpertLayer(hidden_size, width) for layer in self.layers}
        )
        self.stored: StoredWeights | None = None
        self._forms: dict[Callable[[ExpertModule], Form], Form] = {}
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
        """Return the expert layer at base layer `layer`, read first if the weights are stored."""
        ffn = self.ffn if self.stored is None else self.form(read_weights)
        part = ffn[str(layer)]
        assert isinstance(part, ExpertLayer)
        return part

    def forward(self, layer: int, x: Tensor) -> Tensor:
        """Return the module's output at base layer `layer` for gate inputs `[..., D]`."""
        y: Tensor = self.at(layer)(x)
        return y

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.at(self.layers[0]).down_proj.dtype if self.stored is None else self.stored.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        if self.stored is None:
            return self.at(self.layers[0]).down_proj.device
        return self.stored.device

    @property
    def nbytes(self) -> int:
        """Bytes of the weights in memory, or of stored ones once they are read."""
        return len(self.layers) * 3 * self.hidden_size * self.width * self.dtype.itemsize

    def placed(self, device: torch.device, dtype: torch.dtype) -> "ExpertModule":
        """Return a copy on a device, in a dtype; stored weights go there when they are read."""
        copied = copy.copy(self)
        copied._modules = {"ffn": copy.deepcopy(self.ffn).to(device, dtype)}
        copied._forms = {}
        if self.stored is not None:
            copied.stored = replace(self.stored, dtype=dtype, device=device)
        return copied

    def store(self, file: PackFile, cache: WeightCache) -> None:
        """Drop the weights; from now on they are read when they are needed.

        Args:
            file: the pack that this module comes from.
            cache: keeps the weights that are in memory.
        """
        self.stored = StoredWeights(file, cache, self.dtype, self.device)
        self.ffn = ExpertLayers()
        # Tensors that were read together share one buffer; the copies let it be freed.
        self.gates = {layer: gate.clone() for layer, gate in self.gates.items()}
        self.moments = {layer: moments.clone() for layer, moments in self.moments.items()}
        if self.relevance is not None:
            self.relevance = self.relevance.copied()

    def form(self, make: "Callable[[ExpertModule], F]") -> F:
        """Return the weights in another form, which is made once and then kept.

        The form of stored weights is kept in the cache, which may evict it.

        Args:
            make: makes the form of a module.

        Raises:
            ConfigError: there is no memory for stored weights.
            PackError: the file of stored weights was changed.
        """
        if self.stored is not None:
            return self.stored.cache.get(self, make)
        if make not in self._forms:
            self._forms[make] = make(self)
        return cast(F, self._forms[make])

    def made_form(self, make: "Callable[[ExpertModule], F]") -> F | None:
        """Return the weights in another form if that is in memory, else None."""
        if self.stored is not None:
            return self.stored.cache.peek(self, make)
        return cast(F | None, self._forms.get(make))

    def read(self) -> ExpertLayers:
        """Return the expert layers without keeping stored ones in memory.

        Raises:
            PackError: the file of stored weights was changed.
        """
        if self.stored is None:
            return self.ffn
        made = self.stored.cache.peek(self, read_weights)
        return read_weights(self) if made is None else made

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
            ConfigError: the module has no such layer, or a shape or a value is wrong.
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
            ConfigError: a value is not valid in a manifest.
        """
        if dtype not in DTYPE_NAMES:
            valid = ", ".join(DTYPES)
            raise ConfigError(f"dtype={shown(dtype)} must be one of {valid}.")
        relevance = self.relevance
        pairs_S = None if relevance is None else relevance.pairs_S
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
                vocabulary=0 if relevance is None else len(relevance.table_V),
                pairs=pairs_S is not None,
            )
        except ValidationError as error:
            raise ConfigError(f"The pack cannot be written, {explain(error)}.") from None
        tensors = {
            name: tensor.detach().to("cpu", dtype, copy=True)
            for name, tensor in self.state_dict().items()
        }
        tensors |= {f"gate.{layer}": gate.clone() for layer, gate in self.gates.items()}
        tensors |= {f"moments.{layer}": moments.clone() for layer, moments in self.moments.items()}
        if relevance is not None:
            tensors["relevance"] = relevance.table_V.half()
        if pairs_S is not None:
            tensors["pairs"] = pairs_S.half()
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
        module.load_state_dict(_weights(pack, dtype, device), assign=True)
        module.gates = {layer: pack.tensors[f"gate.{layer}"] for layer in module.layers}
        module.moments = {layer: pack.tensors[f"moments.{layer}"] for layer in module.layers}
        module.settings = manifest.gate
        if "relevance" in pack.tensors:
            gate = manifest.gate
            module.relevance = Relevance(
                pack.tensors["relevance"],
                gate.relevance_threshold,
                gate.relevance_offset,
                pack.tensors.get("pairs"),
            )
        module.digest = manifest.digest
        return module.requires_grad_(False).eval()


def read_weights(module: ExpertModule) -> ExpertLayers:
    """Read the expert layers of a module whose weights are stored, frozen and in eval mode.

    Raises:
        PackError: the file was changed.
    """
    stored = module.stored
    assert stored is not None
    with torch.inference_mode(False):  # later passes may record gradients through them
        pack = stored.file.read()
        return ExpertModule.from_pack(pack, stored.dtype, stored.device).ffn


def _weights(
    pack: ExpertPack, dtype: torch.dtype | None, device: torch.device | None
) -> dict[str, Tensor]:
    """Return the tensors of a pack's expert layers (see `ExpertModule.from_pack`)."""
    tensors = {
        name: tensor.to(device, dtype)
        for name, tensor in pack.tensors.items()
        if name.startswith("ffn.")
    }
    if dtype == torch.float16:  # the only dtype with a smaller range than a pack's
        check_finite(tensors, "in the model's float16")
    return tensors
