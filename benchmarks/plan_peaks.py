"""Estimated peak memory of training against the measured one, on small configurations.

    python benchmarks/plan_peaks.py            # on a GPU if there is one, else on the processor
    python benchmarks/plan_peaks.py --resume   # keep the measured peaks in results/plan_peaks.json

Each configuration trains for two steps in its own process, in fp32, with the task, loss and
optimiser of `deepseek pretrain`; from the second step on, all state is allocated. On a GPU, the
peak is that of PyTorch's allocator. On the CPU it is the peak resident memory, less the resident
memory of the same process after a one-layer model of the same kind was trained and before the real
one is built, so that libraries and compiled kernels do not count.
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
from entry import run_main

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
BATCHES = ((1, 512), (4, 512), (1, 2048), (2, 2048))
"""Rows, and tokens per row."""

COMMON = {"vocab_size": 8192, "num_attention_heads": 8, "max_position_embeddings": 2048}
STEPS = 2
WARM_UP = (1, 512)


def configurations() -> dict[str, tuple[dict[str, int], int, int]]:
    """Return twelve configurations: fields of the model, rows, and tokens per row."""
    return {
        f"{name}, {rows} x {length}": ({**COMMON, **shape}, rows, length)
        for name, shape in SHAPES.items()
        for rows, length in BATCHES
    }


def estimate(fields: dict[str, int], rows: int, length: int) -> float:
    """Return the estimated peak in bytes."""
    import torch

    from deepseek.planning import plan

    made = plan(
        fields,
        1,
        device="h100" if torch.cuda.is_available() else "laptop",
        rows_per_gpu=rows,
        length=length,
        precision="float32",
        recompute=False,
    )
    return made.memory(1).peak


def measure(fields: dict[str, int], rows: int, length: int) -> float:
    """Train in this process and return the measured peak in bytes."""
    import torch

    from deepseek.device.memory import peak_memory
    from deepseek.model.config import ModelConfig
    from deepseek.model.transformer import DeepSeekModel

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train(DeepSeekModel, ModelConfig(**fields | {"num_hidden_layers": 1}), device, *WARM_UP)
    before = 0.0
    if device.type == "cpu":
        before = float(resident())
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    else:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    train(DeepSeekModel, ModelConfig(**fields), device, rows, length)
    peak = float(highest()) if device.type == "cpu" else float(peak_memory(device))
    return peak - before


def train(model_class: Any, config: Any, device: Any, rows: int, length: int) -> None:
    """Create a model and train it for a few steps on random tokens."""
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
    """Return an entry of this process's memory status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def resident() -> int:
    """Return the resident memory in bytes."""
    return status("VmRSS:")


def highest() -> int:
    """Return the peak resident memory in bytes since the last reset."""
    return status("VmHWM:")


def child(name: str) -> dict[str, float]:
    """Return the estimated and measured bytes of a configuration, measured in a child process."""
    environment = os.environ | {
        # Return freed tensors to the system, so that resident memory is memory in use.
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


def one(name: str) -> dict[str, float]:
    """Return the estimated and measured bytes of a configuration, measured in this process."""
    fields, rows, length = configurations()[name]
    return {"estimated": estimate(fields, rows, length), "measured": measure(fields, rows, length)}


def known(path: Path) -> dict[str, dict[str, float]]:
    """Return the measured peaks of a file, with current estimates."""
    rows: dict[str, dict[str, float]] = json.loads(path.read_text())["configurations"]
    return {
        name: {"estimated": estimate(*fields), "measured": rows[name]["measured"]}
        for name, fields in configurations().items()
        if name in rows
    }


def report(name: str, row: dict[str, float], seconds: float) -> None:
    print(
        f"{name:20} estimated {row['estimated'] / 1e6:7,.0f} MB, measured "
        f"{row['measured'] / 1e6:7,.0f} MB, ratio {row['estimated'] / row['measured']:.3f} "
        f"({seconds:.0f} s)",
        flush=True,
    )


def save(table: dict[str, dict[str, float]], path: Path) -> None:
    """Write the figures; called after each configuration, so that an interrupted run keeps them."""
    worst = max(abs(row["estimated"] / row["measured"] - 1) for row in table.values())
    left = [name for name in configurations() if name not in table]
    results.write(path, {"configurations": table, "worst_difference": worst, "not_run": left})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--one", help="measure one configuration in this process")
    parser.add_argument("--only", nargs="*", default=list(configurations()), help="their names")
    parser.add_argument("--resume", action="store_true", help="keep the measured peaks of the file")
    parser.add_argument("--json", type=Path, default=results.FOLDER / "plan_peaks.json")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one)))
        return
    table = known(options.json) if options.resume else {}
    for name in configurations():
        started = time.monotonic()
        if name not in table and name in options.only:
            table[name] = child(name)
        if name in table:
            report(name, table[name], time.monotonic() - started)
            save(table, options.json)


if __name__ == "__main__":
    run_main(main)
