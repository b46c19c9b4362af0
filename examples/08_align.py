"""RLPO on a tiny model: the policy learns to raise the reward, and each step reports its KL to the
reference.

python examples/08_align.py
"""

import torch

from deepseek import DeepSeekModel, ModelConfig, rlpo_update
from deepseek.train.loop.optim import OptimConfig
from deepseek.train.rl.rlpo import RLPOConfig
from deepseek.train.rl.rollout import Responses
from deepseek.train.rl.update import RLPOState

torch.manual_seed(0)
model = DeepSeekModel(
    ModelConfig(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_experts=8,
        expert_dim=16,
        initializer_range=0.2,
    )
)


def sevens(responses: Responses) -> torch.Tensor:
    """Return how many tokens of each response are a 7."""
    return (responses.mask_BT * (responses.targets_BT == 7)).sum(1)


config = RLPOConfig(new_tokens=4, minibatch=32, target_kl=8.0, entropy_floor=0.0)
state = RLPOState(model, sevens, config, optim=OptimConfig(learning_rate=2e-3))
batch = {"prompts": torch.randint(0, 16, (64, 3))}
for step in range(16):
    metrics = rlpo_update(model, sevens, batch, state=state)
    if step % 5 == 0:
        score, kl = metrics["score"], metrics["kl"]
        print(f"step {step:2}  sevens {score:.2f} of 4  KL {kl:.2f} nats an answer")
