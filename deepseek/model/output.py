"""The output of a forward pass."""

from dataclasses import dataclass
from typing import Any

from transformers.modeling_outputs import CausalLMOutputWithPast


@dataclass
class ModelOutput(CausalLMOutputWithPast):
    """Hugging Face's output of a causal language model, with expert statistics.

    Attributes:
        router_stats: a tuple of one `RouterStats` per mixture-of-experts layer; None for a dense
            model.
        experts: the armed experts; their `attribution()` returns the weight of each at each token.
            None if no expert was armed.
    """

    router_stats: Any = None
    experts: Any = None
