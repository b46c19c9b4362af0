"""Config fields of mixtures of experts: our own kinds, and those of the families that load."""

from typing import Any

DYNAMIC: dict[str, Any] = {
    "num_experts": 8,
    "expert_dim": 72,
    "num_shared_experts": 1,
    "max_experts": 4,
    "candidate_experts": 6,
    "router_temperature": 0.5,
}

MIXTURES: dict[str, dict[str, Any]] = {
    "dynamic": DYNAMIC,
    "shared pools": DYNAMIC | {"expert_sharing": 3, "min_experts": 2},
    "mixtral": {"num_experts": 4, "expert_dim": 100, "max_experts": 2, "routing_strategy": "topk"},
    "qwen3_moe": {
        "num_experts": 20,
        "expert_dim": 40,
        "max_experts": 4,
        "routing_strategy": "topk",
        "qk_norm": "head",
    },
    "olmoe": {
        "num_experts": 8,
        "expert_dim": 64,
        "max_experts": 3,
        "routing_strategy": "topk",
        "router_renormalize": False,
        "qk_norm": "width",
    },
    "deepseek_v3": {
        "num_experts": 8,
        "expert_dim": 40,
        "num_shared_experts": 2,
        "max_experts": 3,
        "routing_strategy": "topk",
        "router_score": "sigmoid",
        "router_scale": 2.5,
        "num_expert_groups": 4,
        "max_expert_groups": 2,
        "dense_layers": [0],
    },
    "all experts": {
        "num_experts": 3,
        "expert_dim": 70,
        "max_experts": 3,
        "routing_strategy": "dense",
    },
}
