"""Several processes give the result of one, survive the death of one, and resume with another
number of processes.
"""

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import run
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from deepseek.data import RowLoader, TokenShards
from deepseek.model.config import ModelConfig
from deepseek.model.transformer import DeepSeekModel
from deepseek.train.jobs.language import LanguageTask
from deepseek.train.loop.backends.fsdp2 import FSDP2
from deepseek.train.loop.metrics import read_metrics

SCRIPT = str(Path(__file__).with_name("tiny_pretrain.py"))
STEPS = 50
LEARNING_RATE = 3e-3
"""Learning rate of `tiny_pretrain.py`."""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--monitor-interval", "0.2"]


def launch(
    processes: int,
    texts: Path,
    folder: Path,
    kind: str,
    *end: str,
    restarts: int = 0,
    steps: int = STEPS,
) -> None:
    """Run the script in several processes by torchrun; 0: in one process without it."""
    start = [
        *TORCHRUN,
        "--standalone",
        "--nproc-per-node",
        str(processes),
        "--max-restarts",
        str(restarts),
    ]
    command = [
        *(start if processes else [sys.executable]),
        SCRIPT,
        str(texts),
        str(folder),
        kind,
        str(steps),
        *end,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = run(command, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


def assert_same_result(folder: Path, other: Path) -> None:
    """Losses agree to a few units in the last place, weights to a thousandth of one step.

    Sums over two processes round differently from sums over one; AdamW scales up tiny gradients
    with their rounding errors.
    """
    weights, others = (load_file(f / "model" / "model.safetensors") for f in (folder, other))
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        assert (tensor - others[name]).abs().max() <= 1e-3 * LEARNING_RATE, name
    logs = [
        [
            record["loss"]
            for record in read_metrics(f / "run" / "training" / "metrics.jsonl")
            if "loss" in record
        ]
        for f in (folder, other)
    ]
    assert len(logs[0]) == STEPS and logs[0] == pytest.approx(logs[1], rel=1e-6)


@pytest.fixture(scope="module")
def alone(domains: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    launch(0, domains, folder, "experts")
    return folder


@pytest.mark.slow
def test_checkpoints_go_from_two_processes_to_a_plain_one_and_back_where_one_dies(
    alone: Path, domains: Path, tmp_path: Path
) -> None:
    launch(2, domains, tmp_path, "experts", "13", "stop")
    launch(0, domains, tmp_path, "experts", "28", "stop")
    launch(2, domains, tmp_path, "experts", "40", "die", restarts=1)
    assert (tmp_path / "died").exists()
    assert_same_result(tmp_path, alone)
    parts = sorted(
        (tmp_path / "run" / "training" / "checkpoints" / f"step-{STEPS:08d}").glob("*.safetensors")
    )
    sizes = [part.stat().st_size for part in parts]
    assert len(parts) == 2 and max(sizes) <= 0.55 * sum(sizes)
    held = [
        float((folder / f"held-{rank}").read_text())
        for folder, rank in ((alone, 0), (tmp_path, 0), (tmp_path, 1))
    ]
    assert held[0] == 1.0 and max(held[1:]) <= 0.55, "of parameters, gradients and moments"


@pytest.mark.slow
def test_a_dense_model_in_two_processes_equals_one(domains: Path, tmp_path: Path) -> None:
    for processes in (0, 2):
        launch(processes, domains, tmp_path / str(processes), "dense")
    assert_same_result(tmp_path / "0", tmp_path / "2")


@pytest.mark.slow
def test_a_domain_with_fewer_held_out_rows_than_processes_is_scored(
    domains: Path, tmp_path: Path
) -> None:
    shutil.copytree(domains / "words", tmp_path / "words")
    (tmp_path / "code").mkdir()
    for number in range(6):  # by the hashes of the names, only 5.py is held out
        (tmp_path / "code" / f"{number}.py").write_text(f"v{number} = {number}\n")
    figures = []
    for processes in (0, 2):
        folder = tmp_path / str(processes)
        launch(processes, tmp_path, folder, "experts", steps=1)
        held_out = TokenShards(folder / "run" / "corpus" / "code" / "held-out")
        assert RowLoader(held_out, rows=1, length=32).num_rows == 1
        figures.append(read_metrics(folder / "run" / "training" / "metrics.jsonl")[0])
    for name in ("held_out_loss.code", "held_out_loss", "held_out_max_violation", "idle_experts"):
        assert figures[1][name] == pytest.approx(figures[0][name], rel=1e-6), name


@pytest.mark.parametrize("rank", [0, 1, 100, 255])
def test_each_of_256_processes_holds_exactly_its_part(rank: int) -> None:
    config = ModelConfig(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_experts=8,
        expert_dim=32,
        num_shared_experts=1,
        expert_sharing=2,
    )
    model = DeepSeekModel(config)
    sizes = {name: parameter.shape for name, parameter in model.named_parameters()}
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=256)
    try:
        task = LanguageTask(model, {}, FSDP2(init_device_mesh("cpu", (256,))))
        held = {name: parameter.to_local().shape for name, parameter in task.parameters.items()}
    finally:
        dist.destroy_process_group()
    for name, whole in sizes.items():
        rows = -(-whole[0] // 256)
        mine = max(0, min(rows, whole[0] - rank * rows))
        assert held[name].numel() == mine * whole[1:].numel(), name
    assert any(name.startswith("expert_pools.0") for name in sizes) and torch.Size([0]) != sizes
