"""The arithmetic of plans, against counts by hand and limits that must hold."""

import pytest

import deepseek
from deepseek.errors import ConfigError
from deepseek.model.config import ModelConfig
from deepseek.model.transformer import DeepSeekModel
from deepseek.planning import Shape, training_memory

DENSE = {
    "vocab_size": 100,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def test_shapes_are_those_of_the_model() -> None:
    shape = Shape.of(ModelConfig(**DENSE))
    block = 4 * 16 * 16 + 3 * 16 * 32 + 2 * 16
    assert shape.parameters == shape.active == 100 * 16 + 2 * block + 16
    assert shape.largest_unit == block
    config = ModelConfig(**DENSE, num_experts=8, expert_dim=8, max_experts=2, expert_sharing=2)
    sparse = Shape.of(config)
    assert sparse.parameters == sum(p.numel() for p in DeepSeekModel(config).parameters())
    # One pool; two calls of two experts.
    assert sparse.parameters - sparse.active == 8 * 3 * 16 * 8 - 2 * 2 * 3 * 16 * 8


def test_more_devices_hold_less_and_never_work_better() -> None:
    plan = deepseek.plan("deepseek-8b", 256, tokens=300e9)
    table = plan.table()
    assert [scale.gpus for scale in table] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    memory, efficiency = [scale.memory for scale in table], [scale.efficiency for scale in table]
    assert memory == sorted(memory, reverse=True) and efficiency == sorted(efficiency, reverse=True)
    assert efficiency[0] == 1.0 and table[0].gathered == table[0].reduced == 0
    total = plan.shape.parameters
    assert table[-1].gathered == pytest.approx(2 * total * 2 * 255 / 256)
    assert table[-1].memory - plan.working_bytes == pytest.approx(16 * total / 256)
    assert plan.days == pytest.approx(
        300e9 / (256 * plan.tokens_per_gpu) * table[-1].seconds / 86400
    )


def test_the_largest_preset_is_planned_without_being_built() -> None:
    plan = deepseek.plan("deepseek-175b", 256, device="h200")
    assert 150e9 < plan.shape.parameters < 200e9
    assert plan.at(256).memory < plan.device.memory < plan.at(8).memory
    assert training_memory(plan.config, 4096) > 16 * plan.shape.parameters


def test_mistakes_name_the_right_word() -> None:
    with pytest.raises(ConfigError, match="perhaps 'deepseek-8b'"):
        deepseek.plan("deepseek-8")
    with pytest.raises(ConfigError, match="device 'h10' is unknown"):
        deepseek.plan("deepseek-nano", device="h10")
