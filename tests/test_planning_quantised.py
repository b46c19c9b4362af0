"""Planned bytes of quantised weights against those written by `quantize_model`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizer import tiny_tokenizer

from deepseek.checkpoint.stream import TensorFiles
from deepseek.export.quantize import quantize_model
from deepseek.kernels import int8_layout
from deepseek.model import quantised
from deepseek.model.config import ModelConfig
from deepseek.model.transformer import DeepSeekModel
from deepseek.planning import Architecture, Device, matrices, plan, plan_inference
from deepseek.planning.hardware import QUANTISED_BYTES
from deepseek.planning.sizes import parameters, weight_bytes

SHAPE: dict[str, Any] = {
    "vocab_size": len(tiny_tokenizer()),
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
}
MIXTURE = {"num_experts": 4, "expert_dim": 64, "max_experts": 2, "num_shared_experts": 1}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "untied, with small tensors": {
        "tie_word_embeddings": False,
        "attention_bias": True,
        "attention_output_bias": True,
        "qk_norm": "head",
        "num_key_value_heads": 1,
    },
    "learned positions, rows of no whole groups": {
        "positional_encoding": "learned",
        "intermediate_size": 200,
    },
    "dynamic positions": {"positional_encoding": "dpe", "num_attention_heads": 32},
    "mixture": MIXTURE,
    "shared pools": {**MIXTURE, "num_hidden_layers": 3, "expert_sharing": 2, "dense_layers": [0]},
    "experts of no whole groups": {**MIXTURE, "expert_dim": 96},
}
"""Fields of tiny models; some have matrices that are not quantised."""

SMOLLM2 = Architecture(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", MODELS)
def test_planned_bytes_are_those_that_are_written(name: str, bits: int, tmp_path: Path) -> None:
    config = ModelConfig(**SHAPE | MODELS[name])
    torch.manual_seed(0)
    DeepSeekModel(config).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    quantize_model(tmp_path / "base", tmp_path / "small", bits=bits, device="cpu")
    files = TensorFiles(tmp_path / "small")
    # The routers' balancing state is not a parameter.
    written = sum(files.read(one).nbytes for one in files if ".balance." not in one)
    planned = plan_inference(config, dtype="float32", bits=bits)
    assert planned.memory.weights == pytest.approx(written, rel=1e-12)


def test_constants_are_those_of_the_quantiser() -> None:
    assert (matrices.GROUP, matrices.SMALLEST) == (int8_layout.GROUP, quantised.SMALLEST)


def test_smollm2_has_the_size_of_the_log() -> None:
    """docs/log/quantisation.md"""
    for bits, share in ((4, 0.159), (8, 0.258)):
        weights = plan_inference(SMOLLM2, bits=bits).memory.weights
        assert weights / (4 * parameters(SMOLLM2).total) == pytest.approx(share, abs=5e-4)


@given(
    batch=st.integers(1, 64),
    bits=st.sampled_from([None, 8, 4]),
    tied=st.booleans(),
    sharing=st.sampled_from([1, 2]),
)
def test_a_step_reads_each_part_in_its_own_bytes(
    batch: int, bits: int | None, tied: bool, sharing: int
) -> None:
    memory = Device(80e9, 1e30, 1e12, 1e12, bandwidth=1e12, bandwidth_share=1.0)
    model = Architecture(
        **SHAPE | MIXTURE, tie_word_embeddings=tied, expert_sharing=sharing, target_experts=1.0
    )
    made = plan_inference(model, device=memory, length=1, batch=batch, bits=bits)
    count = parameters(model)
    layers, other = (2.0, 2.0) if bits is None else (QUANTISED_BYTES[bits], QUANTISED_BYTES[8])
    read = layers * (count.attention + count.shared) + 2.0 * (count.router + count.norms)
    read += other * (count.embedding if tied else count.head)
    chosen = 4 * (1 - (1 - 1 / 4) ** batch)  # distinct experts of a layer
    read += other * 2 * chosen * 3 * 128 * 64
    read += 2 * 2 * 128 * 2 * batch  # keys and values
    assert made.token_seconds == pytest.approx(read / 1e12)


@given(trained=st.floats(0.001, 1), bits=st.sampled_from([8, 4]))
def test_frozen_weights_have_the_bytes_of_the_quantised_model(trained: float, bits: int) -> None:
    model = Architecture.of("deepseek-1b")
    made = plan("deepseek-1b", 1, trained=trained, bits=bits).memory(1)
    frozen = weight_bytes(model, 2.0, bits).total
    assert made.weights == pytest.approx(
        4 * trained * parameters(model).total + (1 - trained) * frozen
    )


@given(
    strategy=st.sampled_from(["dense", "topk", "dynamic"]),
    most=st.integers(1, 8),
    target=st.sampled_from([None, 1.0]),
)
def test_experts_of_a_token_are_those_of_its_routing(
    strategy: str, most: int, target: float | None
) -> None:
    fields = {"num_experts": 8, "expert_dim": 4, "max_experts": most, "routing_strategy": strategy}
    model = Architecture(**fields, target_experts=target)
    expected = {"dense": 8, "topk": most, "dynamic": target or most}[strategy]
    assert model.chosen == expected
    none = parameters(Architecture(**{**fields, "expert_dim": 0}))
    assert parameters(model).active - none.active == 8 * expected * 3 * 512 * 4
