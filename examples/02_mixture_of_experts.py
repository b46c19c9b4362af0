"""Upcycle a dense checkpoint to a dynamic mixture of experts: same logits at the start, ready to
train.

python examples/02_mixture_of_experts.py
"""

import torch

from deepseek import DeepSeekModel, DynamicRouter, ModelConfig

config = ModelConfig(
    num_experts=16, expert_dim=256, routing_strategy="dynamic", routing_threshold=0.7
)
dense = DeepSeekModel.from_pretrained("smollm2-135m")
sparse = DeepSeekModel.from_pretrained("smollm2-135m", config=config)
ids = torch.randint(0, dense.config.vocab_size, (1, 64))
with torch.no_grad():
    difference = (sparse(ids).logits - dense(ids).logits).abs().max()
print(f"largest logit difference after upcycling: {difference:.1e}")

output = sparse(ids, labels=ids)
output.loss.backward()
first = output.router_stats[0]
print(f"experts a token at layer 0: {first.mean_active:.2f}, dropped mass {first.dropped_mass:.2f}")
print(f"gradient of its router: {sparse.layers[0].feed_forward.router.weight.grad.norm():.1e}")

# The router alone, for use in your own model.
router = DynamicRouter(num_experts=16, input_dim=64)
x = torch.randn(5, 64)
print(
    "softmax weights",
    tuple(router(x).shape),
    "chosen",
    router.route(x).active_N.tolist(),
    "experts a token",
)
