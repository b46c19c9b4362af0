"""Estimated peak memory of training against the measured one, on small configurations.

    python benchmarks/plan_peaks.py            # on a GPU if there is one, else on the processor

Each configuration trains for three steps in a process of its own, in fp32, with the task, the loss
and the optimiser of `deepseek pretrain`. On a GPU the peak is that of its allocator; on the
processor it is the highest resident memory less that of the same process before the model is built.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import results

SHAPES: dict[str, dict[str, int]] = {
    "wide": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 6},
    "deep": {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 16},
    "mixture": {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_experts": 16,
        "expert_dim": 384,
        "max_experts": 2,
        "min_experts": 2,
        "num_shared_experts": 1,
        "expert_sharing": 2,
    },
}
BATCHES = ((1, 512), (4, 512), (2, 2048), (8, 1024))
"""Rows, and tokens of each."""

COMMON = {"vocab_size": 8192, "num_attention_heads": 8, "max_position_embeddings": 2048}
STEPS = 3


def configurations() -> dict[str, tuple[dict[str, int], int, int]]:
    """Return twelve configurations: fields of the model, rows, and tokens of each row."""
    return {
        f"{name}, {rows} x {length}": ({**COMMON, **shape}, rows, length)
        for name, shape in SHAPES.items()
        for rows, length in BATCHES
    }


def estimate(fields: dict[str, int], rows: int, length: int) -> float:
    """Return the estimated peak in bytes."""
    from deepseek.planning import plan

    made = plan(fields, 1, rows_per_gpu=rows, length=length, precision="float32", recompute=False)
    return made.memory(1).peak


def measure(fields: dict[str, int], rows: int, length: int) -> float:
    """Train in this process and return the measured peak in bytes."""
    import torch

    from deepseek.device.memory import peak_memory
    from deepseek.model.config import ModelConfig
    from deepseek.model.transformer import DeepSeekModel

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train(DeepSeekModel, ModelConfig(**COMMON | {"num_hidden_layers": 1}), device, 1, 64)
    before = 0.0
    if device.type == "cpu":
        before = float(resident())
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    else:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    train(DeepSeekModel, ModelConfig(**fields), device, rows, length)
    peak = float(highest()) if device.type == "cpu" else float(peak_memory(device))
    return peak - before


def train(model_class: Any, config: Any, device: Any, rows: int, length: int) -> None:
    """Make a model and take a few steps on random tokens."""
    import torch

    from deepseek.data import Batch
    from deepseek.train.jobs.language import LanguageTask
    from deepseek.train.loop.optim import OptimConfig, adamw

    model = model_class(config).to(device).train()
    model.compute_dtype = torch.float32
    task = LanguageTask(model, {})
    optimiser = adamw(task.parameters, OptimConfig(learning_rate=1e-4))
    ids = torch.randint(config.vocab_size, (rows, length + 1))
    positions = torch.arange(length).repeat(rows, 1)
    batch = Batch(ids[:, :-1], ids[:, 1:], positions, torch.arange(rows))
    for step in range(STEPS):
        task.loss(batch, step).loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)


def status(name: str) -> int:
    """Return a line of this process's memory status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def resident() -> int:
    """Return the resident memory in bytes."""
    return status("VmRSS:")


def highest() -> int:
    """Return the highest resident memory in bytes since it was reset."""
    return status("VmHWM:")


def child(name: str) -> dict[str, float]:
    """Return estimated and measured bytes of a configuration, measured in a child process."""
    environment = os.environ | {
        # Freed tensors go back to the system, so that the resident memory is what is in use.
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "MALLOC_ARENA_MAX": "2",
    }
    process = subprocess.run(
        [sys.executable, __file__, "--one", name],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    figures: dict[str, float] = json.loads(process.stdout.splitlines()[-1])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--one", help="measure one configuration in this process")
    parser.add_argument("--only", type=int, default=12, help="number of configurations")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    if options.one:
        fields, rows, length = configurations()[options.one]
        figures = {
            "estimated": estimate(fields, rows, length),
            "measured": measure(fields, rows, length),
        }
        print(json.dumps(figures))
        return
    table = {}
    for name in list(configurations())[: options.only]:
        started = time.monotonic()
        table[name] = child(name)
        ratio = table[name]["estimated"] / table[name]["measured"]
        print(
            f"{name:24} estimated {table[name]['estimated'] / 1e6:7,.0f} MB, measured "
            f"{table[name]['measured'] / 1e6:7,.0f} MB, ratio {ratio:.3f} "
            f"({time.monotonic() - started:.0f} s)",
            flush=True,
        )
    worst = max(abs(row["estimated"] / row["measured"] - 1) for row in table.values())
    print(f"worst difference {worst:.1%}")
    if options.json:
        results.write(options.json, {"configurations": table, "worst_difference": worst})


if __name__ == "__main__":
    main()
