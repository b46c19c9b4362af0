"""A pretraining of a few seconds, also as a script that tests can kill or start under torchrun."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

TINY_MODEL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TINY_EXPERTS = {
    "num_experts": 4,
    "expert_dim": 16,
    "num_shared_experts": 1,
    "expert_sharing": 2,
    "max_experts": 2,
}


def settings(
    texts: Path, folder: Path, *, experts: bool = True, steps: int = 12, **changes: Any
) -> dict[str, Any]:
    """Return a configuration: two domains below `texts`, everything written below `folder`."""
    return {
        "name": "tiny",
        "vocab_size": 300,
        "row_length": 32,
        "batch_rows": 4,
        "tokens": steps * 32 * 4,
        "domains": {
            "words": {"folder": str(texts / "words"), "weight": 2},
            "code": {"folder": str(texts / "code")},
        },
        "model": {**TINY_MODEL, **(TINY_EXPERTS if experts else {})},
        "evaluate_every": 5,
        "checkpoint_every": 3,
        "held_out": 0.2,
        "held_out_tokens": 256,
        "samples": ["alpha"],
        "learning_rate": 3e-3,
        "curriculum": True,
        "out": str(folder / "model"),
        "run_folder": str(folder / "run"),
        **changes,
    }


def main(
    texts: Path, folder: Path, kind: str, steps: int, end_at: int | None = None, how: str = "stop"
) -> None:
    """Train; before step `end_at`, stop, or kill the process of rank 1, the first time only."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    import deepseek
    from deepseek.train.loop import loop

    step = loop._Run.step

    def ending_step(run: loop._Run) -> None:
        if run.position.step == end_at and how == "stop":
            run.save()
            sys.exit(0)
        died = folder / "died"
        if run.position.step == end_at and os.environ["RANK"] == "1" and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        step(run)

    loop._Run.step = ending_step  # type: ignore[method-assign]
    register_optimizer_step_post_hook(lambda optimizer, *_: note_held(optimizer, folder))
    deepseek.pretrain(
        settings(texts, folder, experts=kind == "experts", steps=steps, checkpoint_every=10),
        quiet=True,
        device="cpu",
        # In bf16 rounding depends on the order of rows in a batch; two processes equal one only in
        # fp32.
        dtype="float32",
    )


def note_held(optimizer: Any, folder: Path) -> None:
    """Write the share of all parameters, gradients and moments that this process holds."""
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = [
        optimizer.state[parameter][name]
        for parameter in trained
        for name in ("exp_avg", "exp_avg_sq")
    ]
    tensors = [*trained, *(parameter.grad for parameter in trained), *moments]
    held = sum(getattr(tensor, "_local_tensor", tensor).numel() for tensor in tensors)
    (folder / f"held-{os.environ.get('RANK', '0')}").write_text(
        str(held / sum(tensor.numel() for tensor in tensors))
    )


if __name__ == "__main__":
    words = sys.argv[1:]
    end = (int(words[4]), words[5]) if len(words) > 4 else ()
    main(Path(words[0]), Path(words[1]), words[2], int(words[3]), *end)
