"""Experts beside a stock model of transformers: attach, plug, record, detach.

python examples/07_any_model.py [MODEL FOLDER]
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig

import deepseek
from deepseek.model.language_model import expert_beside
from deepseek.packs.manifest import BaseDescription

if len(sys.argv) > 1:
    if not (Path(sys.argv[1]) / "config.json").is_file():
        print(f"error: {sys.argv[1]} is no folder of a model", file=sys.stderr)
        sys.exit(2)
    stock = AutoModelForCausalLM.from_pretrained(sys.argv[1])
else:  # random weights, so that it runs offline
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
    )
    stock = AutoModelForCausalLM.from_config(config)

prompt = torch.arange(3, 19)[None]
before = stock.eval()(prompt).logits

model = deepseek.attach(stock)
sites = model.experts.sites
print(f"{type(model).__name__}: experts can stand beside {[site.path for site in sites]}")
if model.experts.base_folder is None:  # packs are bound to a base by its digests
    model.experts.base = BaseDescription(
        weights="0" * 64, tokenizer="", hidden_size=64, num_layers=4
    )

# A random expert whose gates always fire; `deepseek.train_expert` trains real ones.
expert = expert_beside(model, "random", sites.indices[-2:], width=32)
for layer in expert.layers:
    torch.nn.init.normal_(expert.at(layer).down_proj, std=0.3)
    expert.set_gate(layer, torch.eye(sites.hidden_size + 1)[-1])
model.experts.plug(expert.to_pack(model.experts.base, "Apache-2.0"))

with model.experts.record() as trace:
    changed = float((model(prompt).logits - before).detach().abs().max())
weight = float(trace.weights("random").mean())
print(f"armed: logits change by up to {changed:.2f}, mean weight {weight:.2f}")
with model.experts.arming(None):
    print("not armed: same bits:", torch.equal(model(prompt).logits, before))
stock = deepseek.detach(model)
print("detached: same bits:", torch.equal(stock(prompt).logits, before))
