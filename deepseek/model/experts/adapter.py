"""A LoRA adapter: low-rank changes to linear layers of a frozen base model (arXiv:2106.09685)."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from deepseek.errors import PackError
from deepseek.model.experts.linear_hooks import HookTable, SiteHook, linear_layers, site_name
from deepseek.packs.lora import LoraManifest, LoraSite
from deepseek.packs.pack import ExpertPack, check_finite


class LowRank(nn.Module):
    """The change of one linear layer: `weight * scaling * B A x`.

    Attributes:
        down: A, `[R, D]`.
        up: B, `[F, R]`.
        scaling: factor on the change.
    """

    def __init__(self, down: Tensor, up: Tensor, scaling: float) -> None:
        super().__init__()
        self.down = nn.Parameter(down, requires_grad=False)
        self.up = nn.Parameter(up, requires_grad=False)
        self.scaling = scaling

    def forward(self, x: Tensor, weight: float | Tensor = 1.0) -> Tensor:
        """Return the change `[..., F]` for inputs `[..., D]`."""
        narrow = linear(x, self.down)
        # Factors of several requests are an fp32 tensor, which promotes the product to fp32.
        scaled = (narrow * (self.scaling * weight)).to(narrow.dtype)
        return linear(scaled, self.up)


class AdapterModule(nn.Module):
    """The changes of one adapter, keyed by the model's own names of the linear layers.

    Attributes:
        name: name of the adapter.
        digest: content digest of the pack that it came from.
        sites: name of a linear layer -> index of its change in `changes`.
        changes: the changes.
    """

    def __init__(
        self, name: str, digest: str, changes: dict[str, LowRank], hooks: tuple[SiteHook, ...] = ()
    ) -> None:
        super().__init__()
        self.name = name
        self.digest = digest
        self.sites = {site: index for index, site in enumerate(changes)}
        self.changes = nn.ModuleList(changes.values())
        self._hooks = hooks

    def change(self, site: str, x: Tensor, weight: float | Tensor) -> Tensor | None:
        """Return the change `[..., F]` of a linear layer's output; None: the layer has no change.

        Args:
            site: name of the layer in the model.
            x: input of the layer, `[..., D]`.
            weight: factor that the request sets, or one for each token, `[..., 1]`.
        """
        index = self.sites.get(site)
        if index is None:
            return None
        delta: Tensor = self.changes[index](x, weight)
        return delta

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return sum(parameter.nbytes for parameter in self.parameters())

    def placed(self, device: torch.device, dtype: torch.dtype) -> "AdapterModule":
        """Return a copy on a device, in a dtype, with the same hooks."""
        copied = copy.copy(self)
        copied._modules = {"changes": copy.deepcopy(self.changes).to(device, dtype)}
        return copied

    @staticmethod
    def from_pack(
        pack: ExpertPack,
        model: nn.Module,
        hooks: HookTable,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> "AdapterModule":
        """Return the adapter of a checked pack, hooked to a model's linear layers.

        Args:
            pack: a pack that passed `check_pack` or `read_pack`.
            model: the model.
            hooks: the hooks on the model's linear layers.
            dtype: dtype of the weights; None: the pack's.
            device: device of the weights; None: the CPU.

        Raises:
            PackError: the model has no such linear layer, one has another shape, or a weight
                overflows `dtype`.
        """
        manifest = pack.manifest
        assert isinstance(manifest, LoraManifest)
        layers = linear_layers(model)
        names = match_sites(manifest, layers)
        tensors = {name: tensor.to(device, dtype) for name, tensor in pack.tensors.items()}
        if dtype == torch.float16:  # the only dtype with a smaller range than a pack's
            check_finite(tensors, "in the model's float16")
        changes = {
            name: LowRank(
                tensors[f"{site.name}.lora_A"], tensors[f"{site.name}.lora_B"], site.scaling
            )
            for name, site in names.items()
        }
        own_hooks = tuple(hooks.hook(name, layers[name]) for name in names)
        return AdapterModule(manifest.name, manifest.digest, changes, own_hooks).eval()


def match_sites(manifest: LoraManifest, layers: Mapping[str, nn.Linear]) -> dict[str, LoraSite]:
    """Return the changes of an adapter, keyed by the model's own names of the linear layers.

    Args:
        manifest: manifest of the adapter.
        layers: the linear layers of the model.

    Raises:
        PackError: the model has no such layer, it has another shape, or two changes match it.
    """
    matched: dict[str, LoraSite] = {}
    for site in manifest.sites:
        name = site_name(site.name, layers)
        if name is None or name in matched:
            fault = "is no linear layer of this model's blocks" if name is None else "comes twice"
            raise PackError(
                f"adapter {manifest.name} changes {site.name}, which {fault}; use the model that "
                "the adapter was trained on."
            )
        layer = layers[name]
        if (layer.in_features, layer.out_features) != (site.inputs, site.outputs):
            raise PackError(
                f"adapter {manifest.name} changes {site.name} from {site.inputs} to "
                f"{site.outputs} features, and this model's goes from {layer.in_features} to "
                f"{layer.out_features}; use the model that the adapter was trained on."
            )
        matched[name] = site
    return matched
