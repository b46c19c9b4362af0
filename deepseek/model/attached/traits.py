"""How a stock model treats hidden states, documents and logits, measured on a few tokens."""

import inspect
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from deepseek.errors import ConfigError
from deepseek.model.attached.hooks import CACHE_NAMES
from deepseek.model.attached.model import AttachedModel
from deepseek.model.attached.sites import first_tensor


@dataclass
class Traits:
    """Traits of a model, measured when they are first needed.

    Attributes:
        cuts: layer -> whether a pass can be stopped and resumed before it. Filled by the pass.
    """

    _model: ref[AttachedModel]
    cuts: dict[int, bool] = field(default_factory=dict)

    @cached_property
    def layer_outputs(self) -> int:
        """Length of the tuple that a layer returns; 0 if it returns a tensor."""
        lengths: list[int] = []

        def note(_module: nn.Module, _args: Any, output: Any) -> None:
            lengths.append(len(output) if isinstance(output, tuple) else 0)

        handle = layers_of(self.model)[0].register_forward_hook(note)
        try:
            self.hidden(self.ids)
        finally:
            handle.remove()
        return lengths[0]

    @cached_property
    def separates_documents(self) -> bool:
        """Whether documents in a packed row do not affect each other.

        Attention masks separate them by their positions; a convolution or a recurrent state does
        not.
        """
        ids, other = self.ids, self.ids.clone()
        other[:, :4] += 4
        positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]], device=ids.device)
        first, second = (self.hidden(row, position_ids=positions)[:, 4:] for row in (ids, other))
        # Nearly equal, because the rounding of a mixture of experts depends on all tokens.
        return bool((first - second).abs().max() <= 1e-3 * first.abs().max())

    @cached_property
    def logit_cap(self) -> float | None:
        """The cap c if logits z are capped to c tanh(z / c); None: no cap."""
        config = self.model.config.get_text_config(decoder=True)
        cap = getattr(config, "final_logit_softcapping", None)
        return None if cap is None else float(cap)

    @cached_property
    def logit_scale(self) -> float:
        """Factor s such that logits before the cap are s * (final hidden states @ head^T).

        Raises:
            ConfigError: the logits are not proportional to that product.
        """
        exact = torch.autocast(self.model.device.type, enabled=False)
        with torch.no_grad(), exact, self.model.expert_hooks.running(None):
            # fp64 on the CPU: Apple's GPUs have none.
            logits = self.model(input_ids=self.ids, use_cache=False).logits.cpu().double().flatten()
            head_VD = output_weight(self.model)
            plain = (self.hidden(self.ids) @ head_VD.mT).cpu().double().flatten()
        if self.logit_cap is not None:
            logits = self.logit_cap * torch.atanh(logits / self.logit_cap)
        scale = float(logits @ plain / (plain @ plain))
        error = float((logits - scale * plain).norm() / logits.norm())
        if error > 0.02:
            raise ConfigError(
                f"The logits of a {type(self.model).__name__} are not linear in its final hidden "
                "states, so experts cannot be trained or scored beside it."
            )
        return 1.0 if abs(scale - 1.0) < 0.02 else scale

    @property
    def model(self) -> AttachedModel:
        """The model."""
        model = self._model()
        assert model is not None
        return model

    @property
    def ids(self) -> Tensor:
        """Ids of a few tokens `[1, 8]`."""
        return torch.arange(1, 9, device=self.model.device)[None]

    @torch.no_grad()
    def hidden(self, ids: Tensor, cache: DynamicCache | None = None, **arguments: Any) -> Tensor:
        """Return the final hidden states `[B, T, D]` without experts.

        Args:
            ids: tokens `[B, T]`.
            cache: a `base_cache` of the preceding tokens, to which these are appended; None: no
                preceding tokens, and nothing is cached.
            arguments: further arguments of the decoder.
        """
        if cache is not None and self.cache_name is not None:
            arguments[self.cache_name] = cache
        arguments |= {"input_ids": ids, "use_cache": cache is not None}
        with self.model.expert_hooks.running(None):
            decoder = decoder_of(self.model)
            output = decoder(**supported(decoder, **arguments))
        hidden = first_tensor(tuple(output.values()) if hasattr(output, "values") else output)
        assert hidden is not None
        return hidden

    @property
    def cache_name(self) -> str | None:
        """Name of the decoder's cache argument, current or older; None: it has no such argument."""
        parameters = inspect.signature(decoder_of(self.model).forward).parameters
        return next((name for name in CACHE_NAMES if name in parameters), None)

    def base_cache(self) -> DynamicCache | None:
        """Return an empty cache for `hidden`; None if the decoder does not support this class."""
        model: Any = self.model
        # Some families, such as MiniMax, have a cache argument but accept only their own class.
        if self.cache_name is None or not model._supports_default_dynamic_cache():
            return None
        return DynamicCache(config=model.config.get_text_config(decoder=True))


_TRAITS: WeakKeyDictionary[AttachedModel, Traits] = WeakKeyDictionary()


def traits_of(model: AttachedModel) -> Traits:
    """Return the traits of a model."""
    if model not in _TRAITS:
        _TRAITS[model] = Traits(ref(model))
    return _TRAITS[model]


def decoder_of(model: AttachedModel) -> nn.Module:
    """Return the module that runs the layers of a model."""
    return model.get_submodule(model.expert_hooks.sites.decoder)


def layers_of(model: AttachedModel) -> nn.ModuleList:
    """Return the layers of a model."""
    layers = model.get_submodule(model.expert_hooks.sites.layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


def output_weight(model: AttachedModel) -> Tensor:
    """Return the weights `[V, D]` of a model's output head.

    Raises:
        ConfigError: the model has no output head with a weight matrix.
    """
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor):
        raise ConfigError(f"A {type(model).__name__} has no output head with a weight matrix.")
    return weight


def supported(module: nn.Module, **arguments: Any) -> dict[str, Any]:
    """Return the arguments that are not None and that a module's `forward` accepts."""
    parameters = inspect.signature(module.forward).parameters
    return {
        name: value
        for name, value in arguments.items()
        if value is not None and (name in parameters or "kwargs" in parameters)
    }
