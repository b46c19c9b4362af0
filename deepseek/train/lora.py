"""Low-rank adaptation by PEFT (arXiv:2106.09685), its rank chosen so that few parameters train."""

from typing import Any

from torch import nn

from deepseek.errors import ConfigError

SHARE = 1e-3
"""Most of the model's parameters that may train."""

TARGETS = ("v_proj", "o_proj", "down_proj")
"""Products that get an adapter: at so few parameters, reaching into every feed-forward network is worth more than a
higher rank in the attention alone."""


def add_lora(model: Any, share: float = SHARE) -> Any:
    """Freeze `model`, put adapters into it and return the PEFT model around it; `merge_and_unload` merges them.

    Raises `ConfigError` if even rank 1 exceeds the share.
    """
    from peft import LoraConfig, get_peft_model

    rank = largest_rank(model, share)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def largest_rank(model: nn.Module, share: float = SHARE) -> int:
    """Return the largest rank at which adapters hold at most `share` of the parameters."""
    targets = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in TARGETS
    ]
    each = sum(module.in_features + module.out_features for module in targets)
    budget = share * sum(parameter.numel() for parameter in model.parameters())
    if not each or budget < each:
        raise ConfigError(
            f"LoRA of rank 1 has {each:,} parameters, more than {budget:,.0f}; use mode last-n or expert."
        )
    return int(budget // each)
