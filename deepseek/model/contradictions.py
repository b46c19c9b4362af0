"""Refuse configs whose fields contradict each other."""

from typing import Any

from deepseek import checks
from deepseek.errors import ConfigError
from deepseek.model.rope_parameters import ROTARY, check_rope
from deepseek.model.unread_arguments import refuse_attention_kind


def refuse_contradictions(config: Any) -> None:
    """Raise `ConfigError` if fields of a config contradict each other.

    Args:
        config: a `ModelConfig`, each of whose fields is valid by itself.
    """
    heads = config.num_attention_heads
    if heads % config.num_key_value_heads:
        raise ConfigError(
            f"num_key_value_heads={config.num_key_value_heads} must divide "
            f"num_attention_heads={heads}."
        )
    if config.head_dim % 2 or config.head_dim == 0:
        raise ConfigError(
            f"head_dim={config.head_dim} must be a positive even number; set it, or choose a "
            f"hidden_size that {heads} heads divide evenly."
        )
    refuse_attention_kind(config._attn_implementation)
    _validate_positions(config)
    _validate_attention(config)
    if config.num_experts:
        _validate_experts(config)


def _validate_positions(config: Any) -> None:
    kind = config.positional_encoding
    train_len = config.train_len
    longest = config.max_position_embeddings
    if config.rope_parameters is not None:
        rotary: dict[str, checks.Check] = {
            "rope_parameters": lambda _, value: check_rope(value, kind)
        }
        checks.apply(rotary, config)
    if config.local_rope_theta is not None and (
        kind not in ROTARY or config.sliding_window is None
    ):
        raise ConfigError(
            f"local_rope_theta={config.local_rope_theta} is the rotary base of layers with a "
            "sliding window; it needs a sliding_window and positional_encoding 'rope' or 'dpe'."
        )
    if train_len is not None and kind != "dpe":
        raise ConfigError(
            f"train_len={train_len} contradicts positional_encoding={kind!r}: only 'dpe' has one; "
            "leave it out."
        )
    if train_len is not None and train_len > longest:
        raise ConfigError(
            f"train_len={train_len} must be positive and at most max_position_embeddings={longest}."
        )


def _validate_attention(config: Any) -> None:
    # Imported here because every attention module imports this one.
    from deepseek.model.attention import ATTENTION
    from deepseek.model.positions import POSITIONS

    ATTENTION[checks.choice("attention", config.attention, ATTENTION)].check(config)
    cap = config.attn_logit_softcapping
    if cap is None:
        return
    unbiased = [name for name, positions in POSITIONS.items() if positions.score_bias is None]
    for name, supported in (("attention", ["full"]), ("positional_encoding", unbiased)):
        value = getattr(config, name)
        if value not in supported:
            raise ConfigError(
                f"attn_logit_softcapping={cap} contradicts {name}={value!r}: scores are capped "
                f"with {' or '.join(map(repr, supported))}; leave one of them out."
            )


def _validate_experts(config: Any) -> None:
    if config.hidden_act != "silu":
        raise ConfigError(
            f"hidden_act={config.hidden_act!r} contradicts num_experts={config.num_experts}: the "
            "experts of a mixture have 'silu'."
        )
    layers = config.num_hidden_layers
    if len(config.dense_layers or ()) == layers:
        raise ConfigError(
            f"num_experts={config.num_experts} contradicts dense_layers, which names all {layers} "
            "layers; leave one of them out."
        )
    experts = config.num_experts
    least = config.min_experts
    most = config.max_experts
    if config.expert_dim < 1:
        raise ConfigError(
            f"num_experts={experts} needs a positive expert_dim (it is {config.expert_dim}), the "
            "width of one expert."
        )
    if not 1 <= least <= most <= experts:
        raise ConfigError(
            f"min_experts={least} and max_experts={most} must satisfy 1 <= min_experts <= "
            f"max_experts <= num_experts={experts}."
        )
    if config.routing_strategy == "dynamic" and config.candidate_experts < most:
        raise ConfigError(
            f"candidate_experts={config.candidate_experts} must be at least max_experts={most}."
        )
    if config.target_experts is not None and not least <= config.target_experts <= most:
        raise ConfigError(
            f"target_experts={config.target_experts} must lie between min_experts={least} and "
            f"max_experts={most}."
        )
    if (
        experts % config.num_expert_groups
        or not 1 <= config.max_expert_groups <= config.num_expert_groups
    ):
        raise ConfigError(
            f"num_expert_groups={config.num_expert_groups} must divide num_experts={experts} and "
            f"be at least max_expert_groups={config.max_expert_groups}."
        )
    allowed = experts // config.num_expert_groups * config.max_expert_groups
    if config.routing_strategy == "topk" and most > allowed:
        raise ConfigError(
            f"max_experts={most} must be at most {allowed}, the experts of "
            f"max_expert_groups={config.max_expert_groups} out of "
            f"num_expert_groups={config.num_expert_groups} groups."
        )
