"""A language model with experts: our own, or a stock `transformers` model with attached experts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from deepseek.checkpoint.convert import FAMILIES, convert_config
from deepseek.checkpoint.hub import resolve
from deepseek.checkpoint.store import read_object
from deepseek.device.choose import CPU, choose_device, choose_dtype
from deepseek.errors import CheckpointError, ConfigError, shown
from deepseek.model.attached.load import is_stock, load_attached, stock_layers
from deepseek.model.attached.model import AttachedModel
from deepseek.model.attached.new_expert import attached_expert
from deepseek.model.attached.traits import output_weight, traits_of
from deepseek.model.attention.capped import soft_cap
from deepseek.model.config import ModelConfig
from deepseek.model.experts import ExpertModule
from deepseek.model.kv_cache import KVCache
from deepseek.model.passes import begin
from deepseek.model.transformer import DeepSeekModel

LanguageModel = DeepSeekModel | AttachedModel

UNBOUNDED = 1 << 20
"""Context in tokens of a model whose config sets no limit, such as a state-space model."""


@dataclass(frozen=True)
class OutputHead:
    """The map from a pass's final hidden states (`finish`) to logits.

    Attributes:
        weight_VD: weights `[V, D]`.
        cap: logits z are capped to cap * tanh(z / cap); None: no cap.
    """

    weight_VD: Tensor
    cap: float | None = None

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Return the logits `[B, T, V]`."""
        logits_BTV = linear(hidden_BTD, self.weight_VD)
        return logits_BTV if self.cap is None else soft_cap(logits_BTV, self.cap)


def load_language_model(
    name_or_path: str | Path,
    *,
    config: ModelConfig | None = None,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device | None = None,
) -> LanguageModel:
    """Load a base model of any family.

    Our own families become a `DeepSeekModel`; every other causal language model of `transformers`
    is loaded as its stock class, with experts attached.

    Args:
        name_or_path: a known base, a folder or a hub id.
        config: overrides of the checkpoint's config; for our families only.
        dtype: dtype of the weights and of mixed precision; "auto": the fastest on the device.
        device: a device (see `choose_device`); None: the CPU.

    Raises:
        HubError: the model does not exist or cannot be fetched.
        CheckpointError: the folder is damaged, or `transformers` has no such model.
        ConfigError: `config` does not fit the model, or experts cannot attach to it.
        DeviceError: there is no such device, or it does not support the dtype.
    """
    folder = resolve(str(name_or_path))
    if is_own(raw := read_object(folder / "config.json")):
        return DeepSeekModel.from_pretrained(folder, config=config, dtype=dtype, device_map=device)
    if config is not None:
        raise ConfigError(
            f"A model of type {shown(raw.get('model_type'))} keeps its own architecture; leave "
            "config out."
        )
    place = CPU if device is None else choose_device(device)
    precision = choose_dtype(dtype, place)
    model = load_attached(folder, precision, place)
    if dtype != "auto":
        model.compute_dtype = precision
    model.config.name_or_path = str(name_or_path)
    return model


def is_own(config: dict[str, Any]) -> bool:
    """Return whether the content of a `config.json` describes a model of `DeepSeekModel`.

    Raises:
        CheckpointError: it describes neither that nor a stock model of `transformers`.
    """
    try:
        convert_config(config)
    except CheckpointError:
        if is_stock(config):
            return False
        raise
    return True


def own_model(model: LanguageModel, job: str) -> DeepSeekModel:
    """Return a model that must be a `DeepSeekModel`.

    Args:
        model: the model.
        job: what needs it, for the error message.

    Raises:
        ConfigError: it is a stock model of another family.
    """
    if isinstance(model, AttachedModel):
        raise ConfigError(
            f"{job} is for our own families "
            f"({', '.join(FAMILIES)}); a {type(model).__name__} takes experts only: train one with "
            "`deepseek expert train`."
        )
    return model


def output_head(model: LanguageModel) -> OutputHead:
    """Return the output head of a model.

    Raises:
        ConfigError: an attached model has no output head with a weight matrix.
    """
    if isinstance(model, AttachedModel):
        return OutputHead(output_weight(model), traits_of(model).logit_cap)
    return OutputHead(model.lm_head.weight, model.config.final_logit_softcapping)


def expert_layers(model: LanguageModel) -> tuple[int, ...]:
    """Return the layers that experts can stand beside."""
    if isinstance(model, AttachedModel):
        return model.expert_hooks.sites.indices
    return tuple(range(model.config.num_hidden_layers))


def feed_forward(model: LanguageModel, layer: int) -> nn.Module:
    """Return the feed-forward module of a layer, dense or a mixture.

    Raises:
        ConfigError: the layer of an attached model has none.
    """
    if isinstance(model, AttachedModel):
        return model.get_submodule(model.expert_hooks.sites.at(layer).path)
    block: nn.Module = model.layers[layer]
    return block.get_submodule("feed_forward")


def context_length(model: LanguageModel) -> int:
    """Return the maximum length of a sequence in tokens; `UNBOUNDED` if the config sets none."""
    config = model.config.get_text_config(decoder=True)
    return int(getattr(config, "max_position_embeddings", None) or UNBOUNDED)


class BaseText:
    """Runs a text through the base alone, chunk by chunk, whatever is armed.

    Args:
        model: the model.

    Attributes:
        continues: whether a text can be passed in several chunks. Otherwise the first chunk must be
            the whole text.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._own_cache = KVCache()
        self._own_cache.started = True  # so that a pass does not arm experts
        self._stock_cache = (
            traits_of(model).base_cache() if isinstance(model, AttachedModel) else None
        )
        self.continues = not isinstance(model, AttachedModel) or self._stock_cache is not None

    @torch.no_grad()
    def hidden(self, ids_BT: Tensor) -> Tensor:
        """Return the final hidden states `[B, T, D]` of the next tokens.

        Args:
            ids_BT: the tokens that follow those of earlier calls.
        """
        if not isinstance(self._model, AttachedModel):
            return begin(self._model, ids_BT, cache=self._own_cache).finish()
        return traits_of(self._model).hidden(ids_BT, self._stock_cache)


def expert_beside(
    model: LanguageModel, name: str, layers: Sequence[int], width: int, *, seed: int = 0
) -> ExpertModule:
    """Return a new fp32 expert for a model, on the model's device (see `ExpertModule.beside`).

    Raises:
        ConfigError: a layer does not exist, or has no feed-forward module.
    """
    if isinstance(model, AttachedModel):
        return attached_expert(model, name, layers, width, seed)
    return ExpertModule.beside(model.layers, name, layers, width, seed=seed)


def layers_in(folder: Path) -> tuple[int, ...]:
    """Return the layers that experts can stand beside, without loading the weights of a folder.

    Raises:
        CheckpointError: the folder is damaged, or its family unknown.
        ConfigError: experts cannot attach to the model.
    """
    config = read_object(folder / "config.json")
    if is_own(config):
        return tuple(range(convert_config(config)["num_hidden_layers"]))
    return stock_layers(folder)
