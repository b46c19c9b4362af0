"""What a forward pass returns."""

from dataclasses import dataclass
from typing import Any

from transformers.modeling_outputs import CausalLMOutputWithPast


@dataclass
class ModelOutput(CausalLMOutputWithPast):
    """Hugging Face's causal language model output, with what the experts did.

    Attributes:
        router_stats: one entry per mixture-of-experts layer, or None for a dense model.
        experts: plugged experts that took part, whose `attribution()` tells which spoke at which
            token; or None.
    """

    router_stats: Any = None
    experts: Any = None
