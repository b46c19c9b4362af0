"""Compare SmolLM2's logits and greedy text with those of `transformers`, on twenty texts of 256
tokens and twenty prompts.

    python benchmarks/parity.py
"""

import pydoc_data.topics
import sysconfig
from pathlib import Path

import torch
from entry import run_main
from results import save
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

import deepseek
from deepseek.checkpoint.hub import resolve
from deepseek.model.config import ModelConfig
from deepseek.model.kv_cache import KVCache

BASE = "smollm2-135m"
TEXTS, TOKENS, PROMPT, NEW = 20, 256, 32, 64


def texts() -> list[str]:
    """Return ten texts of prose and ten of code from Python's own documentation and library."""
    prose = [text for _, text in sorted(pydoc_data.topics.topics.items()) if len(text) > 3000][
        : TEXTS // 2
    ]
    code = [
        p.read_text()
        for p in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        if p.stat().st_size > 6000
    ]
    return prose + code[: TEXTS - len(prose)]


@torch.no_grad()
def main() -> None:
    folder = resolve(BASE)
    model, tokenizer = deepseek.load(BASE, dtype="float32")
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    upcycled = deepseek.DeepSeekModel.from_pretrained(
        BASE,
        config=ModelConfig(num_experts=16, expert_dim=256, routing_strategy="dynamic"),
        dtype="float32",
    )
    worst = {"logits": 0.0, "cached": 0.0, "cached_transformers": 0.0, "upcycled": 0.0}
    same = 0
    for text in texts():
        ids = tokenizer(text, return_tensors="pt").input_ids[:, :TOKENS]
        ours, theirs = model(ids).logits, reference(ids).logits
        worst["logits"] = max(worst["logits"], float((ours - theirs).abs().max()))
        worst["upcycled"] = max(worst["upcycled"], float((upcycled(ids).logits - ours).abs().max()))
        worst["cached"] = max(
            worst["cached"], float((stepwise(model, ids, KVCache()) - ours).abs().max())
        )
        own = stepwise(reference, ids, DynamicCache())
        worst["cached_transformers"] = max(
            worst["cached_transformers"], float((own - theirs).abs().max())
        )
        prompt = ids[:, :PROMPT]
        mask = torch.ones_like(prompt)
        written = [
            one.generate(prompt, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
            for one in (model, reference)
        ]
        same += int(torch.equal(*written))
    gradient = router_gradient(upcycled, ids)
    print(f"largest logit difference over {TEXTS} texts x {TOKENS} tokens (fp32)")
    print(f"  against transformers                {worst['logits']:.2e}  (limit 1e-4)")
    print(f"  cached decode against full forward  {worst['cached']:.2e}  (limit 1e-4)")
    print(f"  the same of transformers            {worst['cached_transformers']:.2e}")
    print(f"  upcycled against dense              {worst['upcycled']:.2e}  (limit 1e-5)")
    print(f"greedy texts of {NEW} tokens identical: {same} of {TEXTS}")
    print(f"smallest router gradient norm of the upcycled model at step one: {gradient:.2e}")
    save(
        "parity",
        {
            "largest_difference": worst,
            "identical_texts": same,
            "texts": TEXTS,
            "router_gradient": gradient,
        },
    )


def stepwise(model: PreTrainedModel, ids: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
    """Return the logits of a prefill of half the tokens and one step per remaining token."""
    half = ids.shape[1] // 2
    parts = [model(ids[:, :half], cache=cache).logits]
    parts += [model(ids[:, i : i + 1], cache=cache).logits for i in range(half, ids.shape[1])]
    return torch.cat(parts, dim=1)


@torch.enable_grad()
def router_gradient(model: deepseek.DeepSeekModel, ids: torch.Tensor) -> float:
    """Return the smallest gradient norm over all routers for one text."""
    model(ids, labels=ids).loss.backward()
    return min(float(block.feed_forward.router.weight.grad.norm()) for block in model.layers)


if __name__ == "__main__":
    run_main(main)
