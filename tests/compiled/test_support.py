"""The compiled runner, the exported graph and the stock converter refuse what they cannot compute,
by config field.
"""

import logging
from dataclasses import fields
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from deepseek.compiled import support
from deepseek.compiled.runner import CompiledRunner, supports
from deepseek.compiled.support import unsupported_reason
from deepseek.engine.start import quickest_runner
from deepseek.engine.torch_runner import TorchRunner
from deepseek.errors import ConfigError
from deepseek.export import graph, stock
from deepseek.kernels.numba import openmp
from deepseek.model.config import ModelConfig
from deepseek.model.support import (
    ANY,
    LSH_FIELDS,
    MIXTURE_FIELDS,
    NOT_COMPUTED_WITH,
    FieldRule,
    unsupported,
)
from deepseek.model.transformer import DeepSeekModel

SHAPE: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
}

COMPILED_REFUSES = {
    "attention": "linear",
    "attn_logit_softcapping": 0.0,
    "clip_qkv": 0.0,
    "final_logit_softcapping": 0.0,
    "head_dim": 16,
    "hidden_act": "gelu",
    "lsh_num_buckets": (1 << 16) + 1,
    "positional_encoding": "learned",
    "qk_norm": "layer",
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4},
    "router_score": "softplus",
    "routing_strategy": "hash",
    "sliding_window": 0,
}
GRAPH_REFUSES = {
    "attention": "lsh",
    "attn_logit_softcapping": 50.0,
    "hidden_act": "gelu",
    "positional_encoding": "learned",
}

COMPILED_RUNS: list[dict[str, Any]] = [
    {},
    {"attention_bias": True, "attention_output_bias": True},
    {"full_attention_layers": [0], "sliding_window": 9},
    {"head_dim": 128, "qk_norm": "head"},
    {"clip_qkv": 8.0, "qk_norm": "width"},
    {"head_dim": 32, "hidden_act": "gelu_pytorch_tanh", "post_norms": True},
    {"scale_embeddings": True, "unit_offset_norms": True, "query_pre_attn_scalar": 80.0},
    {"sliding_window": 9, "local_rope_theta": 1e3},
    {"attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0},
    {"positional_encoding": "alibi"},
    {"positional_encoding": "dpe", "train_len": 64},
    {"positional_encoding": "none"},
    {"attention": "lsh", "lsh_exact_layers": []},
    {"attention": "lsh", "lsh_exact_layers": [], "lsh_rounds": 2, "lsh_far_field": True},
    {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    {"tie_word_embeddings": False, "rms_norm_eps": 1e-6},
    {"num_experts": 8, "expert_dim": 24},
    {"num_experts": 8, "expert_dim": 24, "routing_strategy": "dense"},
    {"num_experts": 8, "expert_dim": 24, "num_hidden_layers": 2, "dense_layers": [0]},
    {"num_experts": 8, "expert_dim": 24, "routing_strategy": "topk", "router_score": "sigmoid"},
    # A dense model ignores these fields.
    {"max_experts": 7, "lsh_probes": 2, "use_cache": False, "eos_token_id": [1, 2]},
]


class GrownConfig(ModelConfig):
    """A config with an unknown field."""

    fake_scale: float = 1.0


def build(config: ModelConfig) -> DeepSeekModel:
    torch.manual_seed(0)
    return DeepSeekModel(config).eval()


@pytest.fixture
def model() -> DeepSeekModel:
    return build(ModelConfig(**SHAPE))


@pytest.mark.parametrize("changes", COMPILED_RUNS, ids=lambda changes: "-".join(changes) or "plain")
def test_what_is_supported_runs_compiled(changes: dict[str, Any]) -> None:
    model = build(ModelConfig(**SHAPE | changes))
    assert unsupported_reason(model) is None
    assert type(quickest_runner(model)) is CompiledRunner


@pytest.mark.parametrize("field", COMPILED_REFUSES)
def test_an_unsupported_value_means_the_reference_runner(
    model: DeepSeekModel,
    field: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setitem(vars(model.config), field, COMPILED_REFUSES[field])
    assert not supports(model)
    with caplog.at_level(logging.INFO, "deepseek.engine.start"):
        assert type(quickest_runner(model)) is TorchRunner
    assert f"{field}={COMPILED_REFUSES[field]!r} (must be " in caplog.text
    with pytest.raises(ConfigError, match="Use TorchRunner"):
        CompiledRunner(model)


@pytest.mark.parametrize(
    ("rules", "refused"),
    [(support.RULES, COMPILED_REFUSES), (graph.RULES, GRAPH_REFUSES), (stock.RULES, {})],
)
def test_every_listed_field_is_tested_or_takes_any_value(
    rules: dict[str, FieldRule], refused: dict[str, Any]
) -> None:
    assert {name for name, rule in rules.items() if rule is not ANY} == refused.keys()
    assert not any(rules[name].allows(value) for name, value in refused.items())


@pytest.mark.parametrize("rules", [support.RULES, graph.RULES, stock.RULES])
def test_all_fields_are_listed_and_no_others(rules: dict[str, FieldRule]) -> None:
    assert rules.keys() == {field.name for field in fields(ModelConfig)}


def test_a_new_field_means_the_reference_runner() -> None:
    model = build(GrownConfig(**SHAPE))
    assert type(quickest_runner(model)) is TorchRunner
    assert "fake_scale=1.0 (an unknown field)" in str(unsupported_reason(model))
    with pytest.raises(ConfigError, match=r"fake_scale=1\.0"):
        graph.Graph(model)
    with pytest.raises(ConfigError, match=r"fake_scale=1\.0"):
        stock.stock_config(model.config)


def test_a_config_made_of_the_dictionary_of_another_is_computed_too() -> None:
    again = ModelConfig(**ModelConfig(**SHAPE).to_dict())
    assert unsupported(again, support.RULES) is None
    assert unsupported(again, graph.RULES) is None


def test_a_field_that_was_set_on_the_object_counts(model: DeepSeekModel) -> None:
    model.config.fake_scale = 2.0
    assert "fake_scale=2.0 (an unknown field)" in str(unsupported_reason(model))


@pytest.mark.parametrize("field", GRAPH_REFUSES)
def test_a_graph_is_refused_with_the_reason(
    model: DeepSeekModel, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert graph.Graph(model).outputs[0] == "logits"
    monkeypatch.setitem(vars(model.config), field, GRAPH_REFUSES[field])
    with pytest.raises(
        ConfigError, match=f"{field}={GRAPH_REFUSES[field]!r} .must be .* has no exported form"
    ):
        graph.Graph(model)


@torch.no_grad()
def test_fields_that_take_any_value_change_no_logits_of_a_dense_model(model: DeepSeekModel) -> None:
    ids = torch.arange(9)[None]
    unread = (*NOT_COMPUTED_WITH, *LSH_FIELDS, *MIXTURE_FIELDS)
    numbers = {name: getattr(model.config, name) for name in unread}
    changes: dict[str, Any] = {
        name: 2 * value + 1 for name, value in numbers.items() if type(value) is int
    }
    # Thresholds and rates have a maximum.
    changes |= {name: value / 2 + 0.1 for name, value in numbers.items() if type(value) is float}
    changes["max_experts"] = changes["min_experts"]
    del changes["expert_dim"], changes["num_shared_experts"], changes["shared_expert_dim"]
    other = build(ModelConfig(**SHAPE | changes))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(ids).logits, model(ids).logits)


def test_the_device_and_the_openmp_runtime_are_asked_for(
    model: DeepSeekModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.device("meta"):
        assert "model is on meta" in str(unsupported_reason(DeepSeekModel(ModelConfig(**SHAPE))))
    monkeypatch.setattr(openmp, "runtime", lambda: None)
    assert "OpenMP runtime" in str(unsupported_reason(model))


@pytest.mark.parametrize("target", ["q_proj", "down_proj", "embed_tokens", "lm_head"])
def test_an_adapter_of_peft_means_the_reference_runner_until_it_is_merged(target: str) -> None:
    model = build(ModelConfig(**SHAPE, tie_word_embeddings=False))
    inject_adapter_in_model(LoraConfig(target_modules=[target], r=2), model)
    assert type(quickest_runner(model)) is TorchRunner
    assert target in str(unsupported_reason(model))
    with pytest.raises(ConfigError, match=rf"of peft\..* at .*{target}.*Use TorchRunner"):
        CompiledRunner(model)
    for name, module in list(model.named_modules()):
        if name.endswith(target):
            module.merge()
            model.set_submodule(name, module.get_base_layer())
    assert type(quickest_runner(model)) is CompiledRunner


def test_a_layer_that_computes_more_than_its_weight_means_the_reference_runner(
    model: DeepSeekModel,
) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model.layers[0].attention.o_proj = Doubled(128, 64, bias=False)
    assert "Doubled" in str(unsupported_reason(model))
