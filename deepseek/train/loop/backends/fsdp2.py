"""FSDP2 backend (ZeRO-3): processes shard parameters, gradients and moments, under `torchrun`.

PyTorch's distributed checkpointing writes safetensors, one file per process and nothing pickled;
any number of processes can read them. A checkpoint gets its name only once all parts are on disk.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

from deepseek.checkpoint import store
from deepseek.device.choose import choose_device
from deepseek.train.loop.backends import Backend
from deepseek.train.loop.backends.sharded import load_sharded
from deepseek.train.loop.optim import Weights, no_room_for

B = TypeVar("B")

CONNECT = timedelta(minutes=1)
"""Timeout for joining the process group."""
WORK = timedelta(minutes=30)
"""Timeout of later collective operations."""


@contextmanager
def joined(name: str) -> Iterator["FSDP2"]:
    """Join the process group that `torchrun` started, and leave it at the end.

    Args:
        name: name of the device; "auto" and "cuda" stand for the GPU of this process's rank.

    Raises:
        DeviceError: there is no such device.
    """
    device = choose_device(name).type
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # torchrun reuses one store across restarts. A prefix per restart hides the addresses of dead
    # processes.
    shared, rank, size = next(rendezvous("env://", timeout=CONNECT))
    store_of_start = PrefixStore(
        f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", shared
    )
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=store_of_start, rank=rank, world_size=size, timeout=CONNECT
    )
    dist.distributed_c10d._set_pg_timeout(WORK)
    try:
        yield FSDP2(init_device_mesh(device, (dist.get_world_size(),)))
    finally:
        dist.destroy_process_group()


class FSDP2(Backend):
    """Backend of one process of `mesh`."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self.world = mesh.size()
        self.rank = mesh.get_rank()
        self.main = self.rank == 0

    def shard(self, module: nn.Module, parts: list[nn.Module], dtype: torch.dtype) -> None:
        """Shard `module`; each of `parts`, a block or a shared pool of experts, is gathered by
        itself.
        """
        on_cpu = self.mesh.device_type == "cpu"
        policy = MixedPrecisionPolicy() if on_cpu else MixedPrecisionPolicy(dtype, torch.float32)
        for part in [*parts, module]:
            fully_shard(part, mesh=self.mesh, mp_policy=policy)
        for part in module.modules():
            if isinstance(part, FSDPModule) and on_cpu:
                part.set_force_sum_reduction_for_comms(True)  # gloo has no average reduction

    def share(self, batch: B) -> B:
        """Return every W-th row, starting at this rank, of a dataclass of tensors.

        Args:
            batch: global batch of at least W rows.
        """
        rows = slice(self.rank, None, self.world)
        return type(batch)(*(getattr(batch, field.name)[rows] for field in fields(batch)))  # type: ignore[arg-type]

    def weigh(self, tokens: int) -> tuple[float, int]:
        total = int(self._sum(torch.tensor(float(tokens), dtype=torch.float64)))
        return tokens * self.world / max(1, total), total

    def mean(self, values: Tensor) -> Tensor:
        return self._sum(values.clone()) / self.world

    def any(self, flag: bool) -> bool:
        return bool(self._sum(torch.tensor(float(flag))) > 0)

    def barrier(self) -> None:
        dist.barrier()

    def whole(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor

    def save(self, folder: Path, state: Weights, meta: dict[str, Any]) -> None:
        """Write one file per process to a temporary folder, then rename it."""
        temporary = folder.with_name(f".{folder.name}.parts.tmp")
        if self.main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.barrier()
        tensors = {name: tensor.detach() for name, tensor in state.tensors().items()}
        with store.disk_full_explained(no_room_for(folder)):
            state_dict_saver.save(
                tensors,
                storage_writer=HuggingFaceStorageWriter(str(temporary), save_distributed=True),
            )
            if self.main:
                store.seal_state(temporary, folder, meta)
        self.barrier()

    def load(self, folder: Path, state: Weights) -> dict[str, Any]:
        return load_sharded(folder, state, no_dist=False)

    def _sum(self, values: Tensor) -> Tensor:
        values = values.to(self.mesh.device_type)
        dist.all_reduce(values, group=self.mesh.get_group())
        return values.cpu()
