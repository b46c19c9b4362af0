"""Check that a model with an expert plugged but not armed, or unplugged again, computes bit for bit
the base's logits.

Generates greedily from some prompts with the base, with an expert plugged and unarmed, and after
unplugging it, and compares digests of all logits.

    python benchmarks/bit_identity.py EXPERT [--dtype float32 --dtype bfloat16]
"""

import argparse
import hashlib
import pydoc_data.topics
import sysconfig
import time
from pathlib import Path

import torch
from entry import run_main
from results import add_output, write

import deepseek
from deepseek.model.kv_cache import KVCache
from deepseek.packs.library import find_pack

PROMPT_TOKENS, BATCH = 16, 50


def prompts(tokenizer: object, count: int) -> torch.Tensor:
    """Return `[count, PROMPT_TOKENS]` ids from Python's help topics and standard library."""
    library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    whole = "\n".join(
        [*pydoc_data.topics.topics.values(), *(path.read_text() for path in library[:40])]
    )
    ids = tokenizer(whole, return_tensors="pt").input_ids[0]  # type: ignore[operator]
    stride = (len(ids) - PROMPT_TOKENS) // count
    return torch.stack([ids[i * stride : i * stride + PROMPT_TOKENS] for i in range(count)])


@torch.inference_mode()
def digest(model: deepseek.DeepSeekModel, ids: torch.Tensor, tokens: int) -> str:
    """Return a sha256 over the logits of every greedy step of all prompts."""
    seen = hashlib.sha256()
    for batch in ids.split(BATCH):
        cache, step = KVCache(), batch
        for _ in range(tokens):
            logits = model(step, cache=cache, logits_to_keep=1).logits[:, -1]
            seen.update(logits.contiguous().view(torch.uint8).numpy().tobytes())
            step = logits.argmax(-1, keepdim=True)
    return seen.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("expert", help="name or path of a pack")
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16"])
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=64, help="of each prompt's continuation")
    add_output(parser, "bit_identity")
    options = parser.parse_args()
    tokens = options.tokens
    figures = {}
    for dtype in options.dtype or ["float32", "bfloat16"]:
        started = time.monotonic()
        model, tokenizer = deepseek.load(dtype=dtype)
        ids = prompts(tokenizer, options.prompts)
        before = digest(model, ids, tokens)
        name = model.experts.plug(find_pack(options.expert)).name
        armed = digest(model, ids[:BATCH], tokens)
        model.experts.arm(None)
        unarmed = digest(model, ids, tokens)
        first = digest(model, ids[:BATCH], tokens)
        model.experts.unplug(name)
        after = digest(model, ids, tokens)
        figures[dtype] = {
            "unarmed_equal": before == unarmed,
            "unplugged_equal": before == after,
            "digest": before,
        }
        print(
            f"{dtype}: plugged and unarmed {'equal' if before == unarmed else 'DIFFERENT'}, unplugged "
            f"{'equal' if before == after else 'DIFFERENT'}, armed {'equal' if armed == first else 'different'} "
            f"({options.prompts} prompts x {tokens} tokens, {time.monotonic() - started:.0f} s)"
        )
    write(options.json, {"prompts": options.prompts, "tokens": tokens, "results": figures})


if __name__ == "__main__":
    run_main(main)
