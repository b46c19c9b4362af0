"""A checkpoint restores the same bits whichever backend wrote it, even if optional parts are
missing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.spawn import spawn

from deepseek.checkpoint import store
from deepseek.errors import CheckpointError
from deepseek.train.loop import optim
from deepseek.train.loop.backends import SINGLE, Backend
from deepseek.train.loop.backends.fsdp2 import FSDP2
from deepseek.train.loop.optim import OptimConfig, TrainingState, Weights, adamw

META = {"position": {"step": 3}}


def training_state(backend: Backend, seed: int, steps: int) -> TrainingState:
    """Return the state of a tiny sharded model after `steps` optimizer steps."""
    torch.manual_seed(seed)
    # 5 rows are not divisible by 2 processes, and of 1 row one process holds nothing.
    module = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 1))
    backend.shard(module, [], torch.float32)
    parameters = dict(module.named_parameters())
    state = TrainingState(
        parameters, {"bias": torch.rand(3)}, adamw(parameters, OptimConfig(learning_rate=0.1))
    )
    for _ in range(steps):
        module(torch.rand(6, 4)).square().mean().backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
    return state


def whole_tensors(backend: Backend, state: Weights) -> dict[str, Tensor]:
    """Return copies of all tensors of a state, gathered from all processes."""
    return {
        name: backend.whole(tensor.detach()).clone() for name, tensor in state.tensors().items()
    }


def assert_equal(tensors: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name


@contextmanager
def joined(rank: int, world: int, store_file: Path) -> Iterator[FSDP2]:
    """Yield the backend of one of several processes, without torchrun."""
    dist.init_process_group("gloo", init_method=f"file://{store_file}", rank=rank, world_size=world)
    try:
        yield FSDP2(init_device_mesh("cpu", (world,)))
    finally:
        dist.destroy_process_group()


@pytest.fixture
def sharding(tmp_path: Path) -> Iterator[FSDP2]:
    """The FSDP2 backend of a single process, which writes sharded checkpoints."""
    with joined(0, 1, tmp_path / "store") as backend:
        yield backend


@pytest.mark.parametrize("steps", [0, 3])
def test_a_plain_process_restores_a_sharded_checkpoint(
    sharding: FSDP2, tmp_path: Path, steps: int
) -> None:
    folder = tmp_path / "step-00000003"
    saved = training_state(sharding, 1, steps)
    sharding.save(folder, saved, META)
    expected = whole_tensors(sharding, saved)
    state = training_state(SINGLE, 2, 1)
    assert SINGLE.load(folder, state) == META
    assert_equal(whole_tensors(SINGLE, state), expected)
    weights = Weights(training_state(SINGLE, 2, 0).parameters, {"bias": torch.zeros(3)})
    assert SINGLE.load(folder, weights) == META
    for name, tensor in weights.tensors().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("writer", ["plain", "sharded"])
def test_moments_and_random_states_that_a_checkpoint_lacks_are_not_asked_for(
    sharding: FSDP2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str
) -> None:
    """For example, all steps so far were skipped, and the run resumes with one more GPU."""
    folder = tmp_path / "step-00000003"
    backend = SINGLE if writer == "plain" else sharding
    saved = training_state(backend, 1, steps=0)
    backend.save(folder, saved, META)
    expected = whole_tensors(backend, saved)
    states = optim._random_states
    monkeypatch.setattr(
        optim, "_random_states", lambda: {**states(), "cuda:0": torch.zeros(16, dtype=torch.uint8)}
    )
    state = training_state(sharding, 2, steps=1)
    assert sharding.load(folder, state) == META
    monkeypatch.undo()
    assert_equal(whole_tensors(sharding, state), expected)


def test_a_damaged_sharded_checkpoint_is_named_and_changes_nothing(
    sharding: FSDP2, tmp_path: Path
) -> None:
    folder = tmp_path / "step-00000003"
    sharding.save(folder, training_state(sharding, 1, 1), META)
    store.write_json(folder / "meta.json", {"meta": {}, "digest": ""})
    for backend in (SINGLE, sharding):
        state = training_state(backend, 2, 1)
        before = whole_tensors(backend, state)
        with pytest.raises(CheckpointError, match="step-00000003 is damaged"):
            backend.load(folder, state)
        assert_equal(whole_tensors(backend, state), before)


def save_by_two(rank: int, folder: Path) -> None:
    """Write a sharded checkpoint, and its tensors as a plain state for comparison."""
    with joined(rank, 2, folder / "store-1") as backend:
        state = training_state(backend, 1, steps=3)
        backend.save(folder / "step-00000001", state, META)
        tensors = whole_tensors(backend, state)
        if backend.main:
            store.save_state(folder / "expected", tensors, {})


def load_by_two(rank: int, folder: Path) -> None:
    """Restore the plain checkpoint, and compare it with what was saved first."""
    with joined(rank, 2, folder / "store-2") as backend:
        state = training_state(backend, 3, steps=1)
        assert backend.load(folder / "step-00000002", state) == META
        expected, _ = store.load_state(folder / "expected")
        assert_equal(whole_tensors(backend, state), expected)


def test_two_processes_to_a_plain_one_and_back_keep_every_bit(tmp_path: Path) -> None:
    spawn(save_by_two, (tmp_path,), nprocs=2)
    assert len(list((tmp_path / "step-00000001").glob("*.safetensors"))) == 2
    state = training_state(SINGLE, 2, steps=0)
    assert SINGLE.load(tmp_path / "step-00000001", state) == META
    expected, _ = store.load_state(tmp_path / "expected")
    assert_equal(whole_tensors(SINGLE, state), expected)
    SINGLE.save(tmp_path / "step-00000002", state, META)
    spawn(load_by_two, (tmp_path,), nprocs=2)
