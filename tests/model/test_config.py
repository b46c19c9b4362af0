"""`ModelConfig` under the habits of Hugging Face: shown, compared, completed, and loaded."""

import copy
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_expert import save_base
from transformers import T5Config, T5ForConditionalGeneration

import deepseek
from deepseek.errors import ConfigError, DataError
from deepseek.model.config import ModelConfig, field_names

SHAPE = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}


def test_it_is_shown_whole() -> None:
    config = ModelConfig(**SHAPE)
    shown = json.loads(repr(config).removeprefix("ModelConfig"))
    assert shown["hidden_size"] == 32 and shown["attention"] == "full"
    assert repr(config) == str(config)


def test_it_equals_one_with_the_same_fields_alone() -> None:
    assert ModelConfig(**SHAPE) == ModelConfig(**SHAPE)
    assert ModelConfig(**SHAPE) != ModelConfig(**{**SHAPE, "hidden_size": 64})
    assert ModelConfig(**SHAPE) != ModelConfig(**SHAPE, lsh_probes=8)


def test_editors_see_its_fields() -> None:
    parameters = inspect.signature(ModelConfig).parameters
    assert parameters.keys() == field_names() - ModelConfig.attribute_map.keys()
    assert parameters["routing_threshold"].default == 0.7


def test_a_field_and_its_other_name_must_agree() -> None:
    given = {**SHAPE, "max_position_embeddings": 256}
    with pytest.raises(ConfigError, match=r"max_len=128 and max_position_embeddings=256 are"):
        ModelConfig(**given, max_len=128)
    assert ModelConfig(**given, max_len=256).max_position_embeddings == 256


def test_a_mixture_without_layers_is_refused() -> None:
    mixture = {**SHAPE, "num_experts": 4, "expert_dim": 8}
    with pytest.raises(ConfigError, match="dense_layers, which names all 2 layers"):
        ModelConfig(**mixture, dense_layers=[0, 1])
    assert ModelConfig(**mixture, dense_layers=[0]).is_sparse(1)


def test_what_callers_pass_on_unset_is_accepted(tmp_path: Path) -> None:
    """lm-eval passes a subfolder, PEFT and others what nobody has set."""
    base = str(save_base(tmp_path / "base"))
    unset: dict[str, Any] = {"subfolder": "", "variant": None, "output_loading_info": False}
    model = deepseek.DeepSeekModel.from_pretrained(base, **unset)
    same = deepseek.DeepSeekModel.from_pretrained(base)
    assert all(map(torch.equal, model.parameters(), same.parameters()))
    with pytest.raises(ConfigError, match="no argument 'subfolder'"):
        deepseek.DeepSeekModel.from_pretrained(base, subfolder="inner")
    with pytest.raises(ConfigError, match="quantise the model first, with `deepseek quantize`"):
        deepseek.DeepSeekModel.from_pretrained(base, load_in_8bit=True)


def test_modules_with_public_names_need_no_import_of_their_own() -> None:
    assert issubclass(deepseek.errors.ConfigError, deepseek.errors.UserError)
    assert callable(deepseek.planning.plan_inference)
    assert {"errors", "planning"} <= set(dir(deepseek))


def test_an_encoder_decoder_model_is_refused_in_one_sentence() -> None:
    shape = {"vocab_size": 64, "d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**shape, d_kv=8))
    with pytest.raises(ConfigError, match="is an encoder-decoder model"):
        deepseek.attach(model)


@pytest.mark.parametrize("name", ["dataset", "texts", "data"])
def test_text_in_memory_is_answered_with_the_way_to_a_file(name: str) -> None:
    with pytest.raises(ConfigError, match=r"text is read from files; .* give from_jsonl=FILE"):
        deepseek.train_expert("nowhere", name="x", **{name: ["a"]})


def test_other_libraries_names_of_arguments_are_answered_with_ours() -> None:
    with pytest.raises(ConfigError, match="perhaps 'learning_rate' is meant"):
        deepseek.train_expert("nowhere", name="x", lr=1e-3)
    with pytest.raises((ConfigError, DataError), match=r"\(JSONL file to learn from\) must be"):
        deepseek.train_expert("nowhere", name="x", from_jsonl=3)


@pytest.mark.parametrize(
    ("alias", "field"),
    [("max_len", "max_position_embeddings"), ("num_experts_per_tok", "max_experts")],
)
def test_an_alias_overrides_the_field_of_a_checkpoint(alias: str, field: str) -> None:
    checkpoint = {"num_experts": 8, "expert_dim": 8, field: 2}
    given = ModelConfig(**{alias: 4}).given
    assert given == {field: 4}
    assert getattr(ModelConfig(**{alias: 4}).merged_into(checkpoint), field) == 4


def test_a_field_assigned_after_construction_is_as_good_as_a_passed_one(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    passed = ModelConfig(num_experts=4, expert_dim=16, num_experts_per_tok=2)
    assigned = ModelConfig()
    assigned.num_experts = 4
    assigned.update({"expert_dim": 16, "num_experts_per_tok": 2})
    assert assigned.given == passed.given
    for config in (assigned, copy.deepcopy(assigned)):
        model = deepseek.DeepSeekModel.from_pretrained(base, config=config)
        assert model.config.max_experts == 2
        assert model.sparse_layers == [0, 1, 2]
    assigned.save_pretrained(tmp_path / "saved")
    again = ModelConfig.from_pretrained(tmp_path / "saved")
    assert again.to_dict() == assigned.to_dict()
    assert not {"_given", "_complete"} & assigned.to_dict().keys()
    assert ModelConfig.from_dict(SHAPE, use_cache=False).given == {**SHAPE, "use_cache": False}


def test_an_assigned_value_is_checked(tmp_path: Path) -> None:
    config = ModelConfig(**SHAPE)
    with pytest.raises(ConfigError, match="num_experts=-1"):
        config.num_experts = -1
    with pytest.raises(ConfigError, match="max_position_embeddings='long'"):
        config.max_len = "long"
    assert config.given == SHAPE
    config.attention = "lhs"
    with pytest.raises(ConfigError, match="attention='lhs' is unknown; perhaps 'lsh'"):
        deepseek.DeepSeekModel(config)
    config = ModelConfig()
    config.attention = "lhs"
    with pytest.raises(ConfigError, match="attention='lhs' is unknown; perhaps 'lsh'"):
        deepseek.DeepSeekModel.from_pretrained(save_base(tmp_path), config=config)


LINEAR = {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rope_theta", 500.0),
        ("rope_scaling", LINEAR),
        ("rope_scaling", {"type": "linear", "factor": 4.0, "rope_theta": 500.0}),
        ("rope_parameters", LINEAR),
        ("rope_parameters", None),
    ],
)
def test_rotary_parameters_are_assigned_by_all_their_names(name: str, value: Any) -> None:
    passed = ModelConfig(**{name: value})
    assigned = ModelConfig()
    setattr(assigned, name, value)
    checkpoint = {"rope_parameters": {"rope_theta": 1e6, "rope_type": "linear", "factor": 2.0}}
    assert assigned.rope_parameters == passed.rope_parameters
    merged = assigned.merged_into(checkpoint).rope_parameters
    assert merged == passed.merged_into(checkpoint).rope_parameters


def test_building_a_model_sets_no_field() -> None:
    config = ModelConfig(**SHAPE)
    assert deepseek.DeepSeekModel(config).config.given.keys() - SHAPE.keys() <= {"dtype"}
