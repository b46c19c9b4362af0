"""Load checkpoints with PyTorch's distributed checkpointing, into one process or many."""

import warnings
from collections.abc import Container
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from deepseek.checkpoint import store
from deepseek.train.loop.optim import TrainingState, Weights


def load_sharded(folder: Path, state: Weights, *, no_dist: bool) -> dict[str, Any]:
    """Restore a checkpoint, regardless of how many processes wrote it, and return its metadata.

    A checkpoint has no moments if all steps so far were skipped, and no random state of a GPU that
    the run did not have: such moments are reset, such random states stay.

    Args:
        folder: folder of the checkpoint.
        state: tensors to restore; of sharded ones, each process only reads its part.
        no_dist: whether this process loads alone; otherwise all processes must call.

    Raises:
        CheckpointError: the checkpoint is damaged.
        KeyError: it is of another model, and lacks a parameter or buffer.
    """
    meta = store.state_meta(folder)
    reader = HuggingFaceStorageReader(str(folder))
    stored = reader.read_metadata().state_dict_metadata
    if isinstance(state, TrainingState):
        _allocate_moments(state, stored)
    tensors = {name: tensor.detach() for name, tensor in state.tensors().items() if name in stored}
    with warnings.catch_warnings():
        # PyTorch warns that it loads in a single process even if it is told to.
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        state_dict_loader.load(tensors, storage_reader=reader, no_dist=no_dist)
    state.restore(tensors)
    return meta


def _allocate_moments(state: TrainingState, stored: Container[str]) -> None:
    """Allocate the moments to load into, with the sharding of their parameters.

    Args:
        state: state whose optimizer gets the moments.
        stored: names of the tensors in the checkpoint.
    """
    for name, parameter in state.parameters.items():
        if f"optimizer.{name}.step" in stored:
            state.optimizer.state[parameter] = {
                "step": torch.tensor(0.0, device="cpu"),  # where AdamW counts
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
