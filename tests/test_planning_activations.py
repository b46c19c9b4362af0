"""Planned activations against the tensors that autograd saves for the backward pass."""

from typing import Any

import pytest
import torch
from torch import Tensor

import deepseek
from deepseek.data import Batch
from deepseek.kernels.lsh import attention as lsh_attention
from deepseek.kernels.lsh import tiles
from deepseek.kernels.lsh.bf16_product import multiplies_fast
from deepseek.kernels.moe.grouped_mm import mix_experts_grouped
from deepseek.model.config import ModelConfig
from deepseek.model.moe import experts
from deepseek.model.transformer import DeepSeekModel
from deepseek.planning import Architecture
from deepseek.planning.sizes import activations
from deepseek.train.jobs.language import LanguageTask

ROWS = 2
LENGTH = 128

DENSE = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
}
MIXTURE = DENSE | {
    "num_experts": 4,
    "expert_dim": 96,
    "max_experts": 2,
    "min_experts": 2,
    "num_shared_experts": 1,
    "expert_sharing": 2,
}


def saved_bytes(fields: dict[str, Any], dtype: torch.dtype = torch.float32) -> int:
    """Return the bytes of distinct tensors, other than weights, that a forward pass saves,
    including the hash codes of LSH attention.
    """
    model = DeepSeekModel(ModelConfig(**fields)).train()
    model.compute_dtype = dtype
    kept = [*model.parameters(), *model.buffers()]
    weights = {tensor.untyped_storage().data_ptr() for tensor in kept}
    saved: dict[int, int] = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(64, (ROWS, LENGTH + 1))
    positions = torch.arange(LENGTH).repeat(ROWS, 1)
    batch = Batch(ids[:, :-1], ids[:, 1:], positions, torch.arange(ROWS))
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        output = LanguageTask(model, {}).loss(batch, 0)  # its graph keeps the tensors
    assert output.loss.requires_grad
    for node in nodes(output.loss.grad_fn):
        for codes in getattr(node, "codes", ())[:2]:
            save(codes)
    return sum(saved.values())


def nodes(last: Any) -> set[Any]:
    """Return the nodes of the autograd graph that ends in `last`."""
    found: set[Any] = set()
    open_nodes = [last]
    while open_nodes:
        node = open_nodes.pop()
        if node is not None and node not in found:
            found.add(node)
            open_nodes += [earlier for earlier, _ in node.next_functions]
    return found


@pytest.mark.parametrize(
    ("fields", "processor"),
    [(DENSE, True), (MIXTURE, True), (MIXTURE, False)],
    ids=["dense", "mixture on a processor", "mixture on a GPU"],
)
def test_activations_are_those_that_autograd_saves(
    fields: dict[str, int], processor: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not processor:  # the GPU path, run on the CPU
        monkeypatch.setattr(experts, "mix_experts", mix_experts_grouped)
    two, six = ({**fields, "num_hidden_layers": layers} for layers in (2, 6))
    saved = saved_bytes(six) - saved_bytes(two)
    planned = [
        activations(Architecture.of(deep), 4, processor=processor) * ROWS * LENGTH
        for deep in (two, six)
    ]
    # Scores of routers, indices of slots and roots of mean squares are not planned.
    assert planned[1] - planned[0] == pytest.approx(saved, rel=0.06)
    assert planned[1] < saved_bytes(six)


@pytest.mark.parametrize("encoding", ["rope", "none"])
@pytest.mark.parametrize("precision", ["float32", "mixed"])
@pytest.mark.parametrize("device", ["laptop", "h100"])
def test_what_lsh_attention_saves_beside_flash_attention(
    device: str, precision: str, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "h100":  # the GPU path, run on the CPU
        monkeypatch.setattr(lsh_attention, "_kernels", lambda query: tiles)
    flash = {**DENSE, "num_hidden_layers": 3, "positional_encoding": encoding}
    lsh = {**flash, "attention": "lsh", "lsh_exact_layers": [1], "lsh_local_window": 32}
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    more = saved_bytes(lsh, dtype) - saved_bytes(flash, dtype)
    planned = [
        deepseek.plan(
            fields, 1, device=device, rows_per_gpu=ROWS, recompute=False, precision=precision
        )
        .memory(1)
        .attention
        for fields in (flash, lsh)
    ]
    if (device, precision, encoding) == ("laptop", "mixed", "none") and not multiplies_fast():
        # If the CPU multiplies bf16 no faster than fp32, the kernel's output is kept in fp32 as
        # well, in both LSH layers; the planner assumes a faster one (`copy_bytes`).
        more -= 2 * 4 * DENSE["hidden_size"] * ROWS * LENGTH
    # The tiles' output has a spare row.
    assert planned[1] - planned[0] == pytest.approx(more, rel=1e-3)
