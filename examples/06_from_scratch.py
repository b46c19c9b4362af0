"""Train a tokenizer and a small mixture of experts from scratch, then adapt it to other text.

python examples/06_from_scratch.py
"""

import json
import sysconfig
import tempfile
from pathlib import Path

import deepseek

library = Path(sysconfig.get_path("stdlib"))

with tempfile.TemporaryDirectory() as name:
    work = Path(name)
    model = deepseek.pretrain(
        {
            "name": "first",
            "domains": {
                "network": {"folder": str(library / "asyncio"), "weight": 2},
                "data": {"folder": str(library / "json")},
            },
            "vocab_size": 600,
            "model": {
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_experts": 8,
                "expert_dim": 32,
                "num_shared_experts": 1,
                "expert_sharing": 2,
            },
            "tokens": 40_000,
            "row_length": 128,
            "batch_rows": 8,
            "learning_rate": 3e-3,
            "evaluate_every": 20,
            "held_out": 0.2,
            "held_out_tokens": 2048,
            "out": str(work / "model"),
            "run_folder": str(work / "run"),
        },
        quiet=True,
    )
    figures = json.loads((work / "run" / "result.json").read_text())["figures"]
    print(
        f"{figures['parameters']:,} parameters, held-out loss {figures['held_out_loss']:.2f}, ",
        end="",
    )
    print(f"{figures['idle_experts']:.0f} idle experts")

    adapted = deepseek.adapt(
        str(model),
        name="mail",
        from_folder=library / "email",
        last=1,
        epochs=3,
        tokens=20_000,
        row_length=128,
        learning_rate=5e-3,
        out=work / "adapted",
        run_folder=work / "second",
        quiet=True,
    )
    figures = json.loads((work / "second" / "result.json").read_text())["figures"]
    print(
        f"adapted: {figures['held_out_loss_before']:.2f} -> {figures['held_out_loss']:.2f} on text it had not seen"
    )
    print(f"reads like any other model: {type(deepseek.load(adapted).model).__name__}")
