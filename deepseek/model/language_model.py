"""A language model with experts: our own, or a stock one of `transformers` with experts attached."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from deepseek.model.attached.model import AttachedModel
from deepseek.model.attached.traits import output_weight, traits_of
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
        return logits_BTV if self.cap is None else self.cap * torch.tanh(logits_BTV / self.cap)


def output_head(model: LanguageModel) -> OutputHead:
    """Return the output head of a model.

    Raises:
        ConfigError: the head of an attached model is no matrix.
    """
    if isinstance(model, AttachedModel):
        return OutputHead(output_weight(model), traits_of(model).logit_cap)
    return OutputHead(model.lm_head.weight)


def expert_layers(model: LanguageModel) -> tuple[int, ...]:
    """Return the layers that experts can stand beside."""
    if isinstance(model, AttachedModel):
        return model.expert_hooks.sites.indices
    return tuple(range(model.config.num_hidden_layers))


def context_length(model: LanguageModel) -> int:
    """Return the largest number of tokens of a sequence."""
    config = model.config.get_text_config(decoder=True)
    return int(getattr(config, "max_position_embeddings", None) or UNBOUNDED)
