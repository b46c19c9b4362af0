"""A tiny policy with prompts and a reward, and random tensors for the formulas of `train/rl`."""

import torch
from torch import Tensor

from deepseek.model.config import ModelConfig
from deepseek.model.transformer import DeepSeekModel
from deepseek.train.rl.policy import Policy
from deepseek.train.rl.rlpo import Learner
from deepseek.train.rl.rlpo_config import RLPOConfig
from deepseek.train.rl.rollout import Responses

VOCABULARY = 12


def tiny(seed: int = 0, **changes: object) -> DeepSeekModel:
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return DeepSeekModel(
        ModelConfig(
            vocab_size=VOCABULARY,
            initializer_range=0.2,
            max_position_embeddings=64,
            **(sizes | changes),
        )
    ).eval()


def share_of_sevens(responses: Responses) -> Tensor:
    return (responses.mask_BT * (responses.targets_BT == 7)).sum(1)


def prompts(count: int = 16) -> list[list[int]]:
    return torch.randint(
        2, VOCABULARY, (count, 2), generator=torch.Generator().manual_seed(5)
    ).tolist()


def learner(model: DeepSeekModel, layers: str = "all", **changes: object) -> Learner:
    config = RLPOConfig(**({"new_tokens": 5, "minibatch": 8, "value_rollouts": 0} | changes))
    return Learner(Policy(model, layers), share_of_sevens, config, ends=(1,))


def batch(seed: int, rows: int = 4, length: int = 7) -> tuple[Tensor, ...]:
    """Return three random tensors `[B, T]` and a mask with gaps and an empty row."""
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(rows, length, generator=generator) for _ in range(3)]
    mask = (torch.rand(rows, length, generator=generator) > 0.3).float()
    mask[-1] = 0.0
    return (*parts, mask)
