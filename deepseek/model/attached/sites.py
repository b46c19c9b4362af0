"""Find the decoder of a stock `transformers` model, its layers and their feed-forward modules.

A layer's feed-forward module is looked up by name. Where no known name fits, it is found by what it
does: it maps `[B, T, D]` to `[B, T, D]`, has weight matrices, and its output at a token depends on
that token alone. Attention, convolutions and state spaces fail the last test, norms the second.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deepseek.errors import ConfigError

NAMES: dict[str, str] = {
    "mlp": "",
    "feed_forward": "",
    "ffn": "",
    "block_sparse_moe": "",
    "moe": "",
    "mixer": r"MLP|MoE|FeedForward",
    "shared_mlp": "",
}
"""Name of a layer's child -> pattern (regular expression) that its class name must contain. In a
layer with several of these children, the first one in this table is the site.
"""


@dataclass(frozen=True)
class Site:
    """A feed-forward module that experts can stand beside.

    Attributes:
        layer: index of the layer.
        path: name of the module within the model, such as `model.layers.3.mlp`.
        kind: name of its class.
    """

    layer: int
    path: str
    kind: str


@dataclass(frozen=True)
class ExpertSites:
    """Where experts attach to a model.

    Attributes:
        decoder: name of the module that runs the layers, such as `model`.
        layers: name of the list of layers, such as `model.layers`.
        num_layers: number of layers.
        hidden_size: width D of the residual stream.
        feed_forward: the feed-forward modules, by ascending layer. Layers without one are missing.
    """

    decoder: str
    layers: str
    num_layers: int
    hidden_size: int
    feed_forward: tuple[Site, ...]

    def __iter__(self) -> Iterator[Site]:
        return iter(self.feed_forward)

    @property
    def indices(self) -> tuple[int, ...]:
        """The layers that have a site."""
        return tuple(site.layer for site in self.feed_forward)

    def describe(self, model: PreTrainedModel) -> str:
        """Return the class of a model and the names of its sites, such as `GemmaForCausalLM: mlp`,
        by which a pack recognises them.
        """
        names = sorted({site.path.rpartition(".")[2] for site in self.feed_forward})
        return f"{type(model).__name__}: {', '.join(names)}"

    def at(self, layer: int) -> Site:
        """Return the site of a layer.

        Raises:
            ConfigError: the layer has no feed-forward module.
        """
        for site in self.feed_forward:
            if site.layer == layer:
                return site
        raise ConfigError(
            f"Layer {layer} has no feed-forward module to put an expert beside; choose among "
            f"{', '.join(map(str, self.indices))}."
        )


def find_sites(model: PreTrainedModel) -> ExpertSites:
    """Return where experts attach to a model.

    Args:
        model: a causal language model of `transformers`.

    Raises:
        ConfigError: its layers, or every layer's feed-forward module, cannot be found.
    """
    if model.config.is_encoder_decoder:
        raise ConfigError(
            f"A {type(model).__name__} is an encoder-decoder model, and experts attach to "
            "decoder-only ones; choose a causal language model of transformers."
        )
    config = model.config.get_text_config(decoder=True)
    decoder = model.get_decoder()
    names = {module: name for name, module in model.named_modules()}
    layers = _layer_list(decoder, int(config.num_hidden_layers))
    if layers is None or decoder not in names or decoder is model:
        raise ConfigError(
            f"No decoder layers can be found in a {type(model).__name__}, so experts cannot attach "
            "to it; choose a decoder-only language model of transformers."
        )
    found = {layer: _named(block) for layer, block in enumerate(layers)}
    if not all(found.values()) and model.device.type != "meta":
        unknown = [layer for layer, module in found.items() if module is None]
        found |= _probed(model, layers, unknown, int(config.hidden_size))
    sites = tuple(
        Site(layer, names[module], type(module).__name__)
        for layer, module in sorted(found.items())
        if module is not None
    )
    if not sites:
        raise ConfigError(
            f"No feed-forward module can be found in the layers of a {type(model).__name__} "
            f"({type(layers[0]).__name__}), so experts cannot attach to it; choose a model whose "
            "layers have one."
        )
    return ExpertSites(names[decoder], names[layers], len(layers), int(config.hidden_size), sites)


def _layer_list(decoder: nn.Module, count: int) -> nn.ModuleList | None:
    """Return the outermost list of `count` modules in a decoder."""
    lists = [
        (name.count("."), module)
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    return min(lists, key=lambda item: item[0])[1] if lists else None


def _named(block: nn.Module) -> nn.Module | None:
    """Return the first child of a layer that matches `NAMES`; None if none does."""
    for name, pattern in NAMES.items():
        child = getattr(block, name, None)
        if isinstance(child, nn.Module) and re.search(pattern, type(child).__name__):
            return child
    return None


@dataclass
class _Call:
    """Arguments and output of a module in the probe."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


@torch.no_grad()
def _probed(
    model: PreTrainedModel, layers: nn.ModuleList, unknown: list[int], width: int
) -> dict[int, nn.Module | None]:
    """Return the feed-forward modules of layers that `NAMES` does not match, found by a probe."""
    calls: dict[nn.Module, _Call] = {}

    def record(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls[module] = _Call(args, kwargs, output)

    candidates = [child for layer in unknown for child in layers[layer].children()]
    handles = [
        child.register_forward_hook(record, with_kwargs=True)
        for child in candidates
        if any(parameter.dim() > 1 for parameter in child.parameters())
    ]
    training = model.training
    try:
        model.eval()
        ids = torch.arange(1, 5, device=model.device)[None]
        model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    return {
        layer: next(
            (
                child
                for child in layers[layer].children()
                if child in calls and _acts_on_tokens(child, calls[child], width)
            ),
            None,
        )
        for layer in unknown
    }


def _acts_on_tokens(module: nn.Module, call: _Call, width: int) -> bool:
    """Return whether a module maps `[B, T, D]` to `[B, T, D]`, each token on its own."""
    if len(call.args) != 1 or call.kwargs:
        return False
    x = call.args[0]
    y = first_tensor(call.output)
    if not isinstance(x, Tensor) or y is None or x.dim() != 3:
        return False
    if x.shape != y.shape or x.shape[-1] != width:
        return False
    other = first_tensor(module(torch.cat([x[:, :-1] + 1.0, x[:, -1:]], dim=1)))
    assert other is not None
    alone = torch.allclose(other[:, -1], y[:, -1], rtol=1e-3, atol=1e-5)
    return alone and not torch.allclose(other[:, 0], y[:, 0], rtol=1e-3, atol=1e-5)


def first_tensor(output: Any) -> Tensor | None:
    """Return the hidden states in a module's output, which may be a tuple that starts with them."""
    first = output[0] if isinstance(output, tuple | list) and output else output
    return first if isinstance(first, Tensor) else None
