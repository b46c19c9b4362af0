"""Train a tokenizer and a small mixture of experts from scratch, then adapt it to other text.

python examples/06_from_scratch.py
"""

import json
import sysconfig
import tempfile
from pathlib import Path

import deepseek

LIBRARY = Path(sysconfig.get_path("stdlib"))
DOMAINS = {
    "network": {"folder": str(LIBRARY / "asyncio"), "weight": 2},
    "data": {"folder": str(LIBRARY / "json")},
}
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
EXPERTS = {"num_experts": 8, "expert_dim": 32, "num_shared_experts": 1, "expert_sharing": 2}
ROWS = {"row_length": 128, "quiet": True}

with tempfile.TemporaryDirectory() as name:
    work = Path(name)
    model = deepseek.pretrain(
        name="first",
        domains=DOMAINS,
        vocab_size=600,
        model={**SHAPE, "num_attention_heads": 4, **EXPERTS},
        tokens=40_000,
        batch_rows=8,
        learning_rate=3e-3,
        evaluate_every=20,
        held_out=0.2,
        held_out_tokens=2048,
        out=work / "model",
        run_folder=work / "run",
        **ROWS,
    )
    found = json.loads((work / "run" / "result.json").read_text())["figures"]
    print(f"{found['parameters']:,} parameters, held-out loss {found['held_out_loss']:.2f}")
    print(f"{found['idle_experts']:.0f} idle experts")

    adapted = deepseek.adapt(
        str(model),
        name="mail",
        from_folder=LIBRARY / "email",
        last=1,
        epochs=3,
        tokens=20_000,
        learning_rate=5e-3,
        out=work / "adapted",
        run_folder=work / "second",
        **ROWS,
    )
    found = json.loads((work / "second" / "result.json").read_text())["figures"]
    print(f"adapted: {found['held_out_loss_before']:.2f} -> {found['held_out_loss']:.2f}")
    print(f"loads like any other model: {type(deepseek.load(adapted).model).__name__}")
