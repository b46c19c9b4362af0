"""Named model shapes. The number in a name is the approximate number of parameters;
`deepseek plan NAME` prints the exact one. No weights are published for them.
"""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # Small enough to train in minutes on a laptop.
    "deepseek-nano": {
        "vocab_size": 4096,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "num_experts": 16,
        "expert_dim": 96,
        "num_shared_experts": 1,
        "expert_sharing": 3,
    },
    # 3 pools of 18 routed experts shared by 4 layers each: 31.6M parameters, 64 % of the 49.8M of
    # its dense counterpart.
    "deepseek-29m": {
        "vocab_size": 8192,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "num_experts": 18,
        "expert_dim": 192,
        "num_shared_experts": 1,
        "expert_sharing": 4,
    },
    "deepseek-1b": {
        "vocab_size": 49152,
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 24,
        "num_attention_heads": 20,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
        "num_experts": 32,
        "expert_dim": 640,
        "num_shared_experts": 1,
        "expert_sharing": 2,
    },
    "deepseek-8b": {
        "vocab_size": 65536,
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "max_position_embeddings": 8192,
        "num_experts": 48,
        "expert_dim": 1280,
        "num_shared_experts": 1,
        "expert_sharing": 2,
    },
    "deepseek-175b": {
        "vocab_size": 102400,
        "hidden_size": 6144,
        "intermediate_size": 24576,
        "num_hidden_layers": 60,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "num_experts": 100,
        "expert_dim": 3072,
        "num_shared_experts": 1,
        "expert_sharing": 2,
    },
}
