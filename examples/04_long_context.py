"""Sparse attention and dynamic positions: as functions, and inside a pretrained checkpoint.

python examples/04_long_context.py
"""

import torch

import deepseek
from deepseek import DynamicPositionalEncoding, ModelConfig, sparse_attention

# As a function: 9 query heads, 3 key and value heads, 4,096 tokens. Time grows as n log n, memory
# as n.
query = torch.randn(1, 9, 4096, 64)
key, value = torch.randn(1, 3, 4096, 64), torch.randn(1, 3, 4096, 64)
attended = sparse_attention(query, key, value, num_buckets=64)
print("attended", tuple(attended.shape))

# Causal: changing later tokens changes no earlier output, to the last bit.
for tensor in (query, key, value):
    tensor[:, :, 3000:] = 0.0
print(
    "causal",
    torch.equal(
        sparse_attention(query, key, value, num_buckets=64)[:, :, :3000], attended[:, :, :3000]
    ),
)

# Dynamic positions as a module that adds them to embeddings.
dpe = DynamicPositionalEncoding(d_model=32, max_len=512)
print("positions", tuple(dpe(torch.randn(2, 10, 32), torch.arange(10).expand(2, 10)).shape))

# In a pretrained model: a short text keeps its logits, because every key is a candidate.
dense, tokenizer = deepseek.load("smollm2-135m", dtype="float32")
sparse, _ = deepseek.load("smollm2-135m", config=ModelConfig(attention="lsh"), dtype="float32")
dynamic, _ = deepseek.load(
    "smollm2-135m", config=ModelConfig(positional_encoding="dpe"), dtype="float32"
)
ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
with torch.no_grad():
    expected = dense(ids).logits
    for name, model in {"lsh": sparse, "dpe": dynamic}.items():
        print(name, "differs by", f"{float((model(ids).logits - expected).abs().max()):.0e}")
