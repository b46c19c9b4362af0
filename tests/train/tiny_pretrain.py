"""A pre-training of seconds, also as a script that tests can kill or start under torchrun."""

import sys
from pathlib import Path
from typing import Any

TINY_MODEL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
TINY_EXPERTS = {"num_experts": 4, "expert_dim": 16, "num_shared_experts": 1, "expert_sharing": 2, "max_experts": 2}


def settings(texts: Path, folder: Path, *, experts: bool = True, steps: int = 12, **changes: Any) -> dict[str, Any]:
    """Return a configuration: two domains below `texts`, everything written below `folder`."""
    return {
        "name": "tiny", "vocab_size": 300, "row_length": 32, "batch_rows": 4, "tokens": steps * 32 * 4,
        "domains": {"words": {"folder": str(texts / "words"), "weight": 2}, "code": {"folder": str(texts / "code")}},
        "model": {**TINY_MODEL, **(TINY_EXPERTS if experts else {})}, "evaluate_every": 5, "checkpoint_every": 3,
        "held_out": 0.2, "held_out_tokens": 256, "samples": ["alpha"], "learning_rate": 3e-3,
        "out": str(folder / "model"), "run_folder": str(folder / "run"), **changes,
    }  # fmt: skip


if __name__ == "__main__":
    import deepseek
    from deepseek.kernels import cpu

    # In bf16 the order of rows in a batch rounds differently; two processes equal one only in fp32.
    cpu.has_fast_bfloat16 = lambda: False
    texts, folder, experts, steps = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "experts", int(sys.argv[4])
    every = int(sys.argv[5]) if len(sys.argv) > 5 else 10
    deepseek.pretrain(settings(texts, folder, experts=experts, steps=steps, checkpoint_every=every), quiet=True)
