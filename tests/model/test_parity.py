"""Checkpoints of every supported family give the logits and the text that `transformers` gives."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from deepseek import DeepSeekModel
from deepseek.checkpoint import convert
from deepseek.checkpoint.convert import convert_config
from deepseek.errors import CheckpointError
from deepseek.model import pretrained
from deepseek.model.config import ModelConfig
from deepseek.model.pretrained import load_stored

SMALL: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}

FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "gemma2": lambda: Gemma2Config(
        **SMALL,
        head_dim=32,
        hidden_act="gelu_pytorch_tanh",  # as its checkpoints have it, though no class reads it
        query_pre_attn_scalar=24,
        sliding_window=16,
        attn_logit_softcapping=0.5,
        final_logit_softcapping=2.0,
        attn_implementation="eager",  # transformers' other implementations ignore score caps
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **SMALL,
        head_dim=32,
        query_pre_attn_scalar=24,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    ),
    # Its attention ignores the cap in every implementation.
    "gemma3-capped": lambda: Gemma3TextConfig(
        **SMALL,
        head_dim=32,
        query_pre_attn_scalar=24,
        attn_logit_softcapping=4.0,
        final_logit_softcapping=2.0,
        attn_implementation="eager",
    ),
    "llama": lambda: LlamaConfig(**SMALL, attention_bias=True, rope_parameters=LLAMA3),
    "llama-tied": lambda: LlamaConfig(**SMALL, tie_word_embeddings=True, rope_parameters=YARN),
    "mistral": lambda: MistralConfig(**SMALL, sliding_window=16),
    "qwen2": lambda: Qwen2Config(
        **SMALL, use_sliding_window=True, sliding_window=16, max_window_layers=1
    ),
    "qwen3": lambda: Qwen3Config(**SMALL, head_dim=32),
    "mixtral": lambda: MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SMALL,
        head_dim=16,
        moe_intermediate_size=48,
        num_experts=8,
        num_experts_per_tok=3,
        norm_topk_prob=True,
        mlp_only_layers=[1],
    ),
    "olmoe": lambda: OlmoeConfig(**SMALL, num_experts=8, num_experts_per_tok=2, clip_qkv=0.5),
}


def random_checkpoint(name: str, folder: Path) -> Any:
    """Save a model of family `name` whose every weight is random and large enough to matter."""
    torch.manual_seed(0)
    reference = AutoModelForCausalLM.from_config(FAMILIES[name]()).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.08)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    reference.save_pretrained(folder)
    return reference


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_family_matches_transformers(name: str, tmp_path: Path) -> None:
    reference = random_checkpoint(name, tmp_path)
    model = DeepSeekModel.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.randint(0, 211, (3, 80))
    expected = reference(ids).logits
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=0)
    text, theirs = (
        m.generate(ids[:, :24], max_new_tokens=24, do_sample=False) for m in (model, reference)
    )
    assert torch.equal(text, theirs)


WHAT_A_CLASS_KNOWS = (
    "bos_token_id",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_parameters",
    "sliding_window",
    "tie_word_embeddings",
)


@pytest.mark.parametrize("family", sorted(convert.FAMILIES))
@settings(max_examples=4)
@given(given=st.sets(st.sampled_from(WHAT_A_CLASS_KNOWS)))
@example(given=set())
def test_what_a_config_leaves_out_is_what_its_class_says(family: str, given: set[str]) -> None:
    sizes = SMALL | {"hidden_size": 256, "num_attention_heads": 32}
    for name in ("num_key_value_heads", "max_position_embeddings"):
        sizes.pop(name)
    theirs = CONFIG_MAPPING[family](**sizes)
    raw = {"model_type": family, **sizes}
    raw |= {name: value for name in given if (value := getattr(theirs, name, None)) is not None}
    ours = ModelConfig(**convert_config(raw))
    for name in set(WHAT_A_CLASS_KNOWS) - {"hidden_act", "bos_token_id", "rope_parameters"}:
        if (expected := getattr(theirs, name, None)) is not None:
            assert getattr(ours, name) == expected, name
    rotary = theirs.rope_parameters
    assert ours.rope_parameters == rotary.get("full_attention", rotary)
    assert ours.hidden_act == getattr(theirs, "hidden_activation", "silu")
    assert ours.bos_token_id in (theirs.bos_token_id, None)


@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_parameters", "tie_word_embeddings"])
@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen3"])
@torch.no_grad()
def test_a_config_without_a_default_matches_transformers(
    name: str, key: str, tmp_path: Path
) -> None:
    random_checkpoint(name, tmp_path)
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text())
    del raw[key]
    path.write_text(json.dumps(raw))
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    model = DeepSeekModel.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.randint(0, 211, (2, 60))
    torch.testing.assert_close(model(ids).logits, reference(ids).logits, atol=1e-4, rtol=0)


UNUSUAL: dict[str, dict[str, Any]] = {
    "original length beside the rotary parameters": {
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0},
        "original_max_position_embeddings": 32,
    },
    "windows of some layers": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]
    },
}


@pytest.mark.parametrize("kind", UNUSUAL)
@torch.no_grad()
def test_what_only_some_checkpoints_of_a_family_say_matches_transformers(
    kind: str, tmp_path: Path
) -> None:
    random_checkpoint("mistral", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | UNUSUAL[kind]))
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    model = DeepSeekModel.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.randint(0, 211, (2, 60))
    torch.testing.assert_close(model(ids).logits, reference(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_matrices_that_stay_in_their_files_give_the_same_bits(name: str, tmp_path: Path) -> None:
    random_checkpoint(name, tmp_path)
    loaded = DeepSeekModel.from_pretrained(tmp_path, dtype=torch.float32)
    stored = load_stored(DeepSeekModel, tmp_path, torch.float32)
    ids = torch.randint(0, 211, (1, 30))
    assert torch.equal(stored(ids).logits, loaded(ids).logits)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_tensors_that_add_nothing_are_ignored(name: str, tmp_path: Path) -> None:
    reference = random_checkpoint(name, tmp_path)
    ids = torch.randint(0, 211, (1, 30))
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    for prefix in ("model.", "model.layers.0.self_attn.", "model.layers.2.self_attn."):
        tensors[f"{prefix}rotary_emb.inv_freq"] = torch.full((16,), 1e4)
    if reference.config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    expected = reference(ids).logits
    for model in (
        DeepSeekModel.from_pretrained(tmp_path, dtype=torch.float32),
        load_stored(DeepSeekModel, tmp_path, torch.float32),
    ):
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("changed_row", [0, 210])
@torch.no_grad()
def test_a_tied_head_that_differs_is_refused_and_the_mend_is_right(
    changed_row: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained, "BLOCK_ROWS", 100)
    random_checkpoint("llama-tied", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    head = tensors["model.embed_tokens.weight"].clone()
    head[changed_row, 5] += 1.0
    save_file(tensors | {"lm_head.weight": head}, path, metadata={"format": "pt"})
    loaders = (DeepSeekModel.from_pretrained, partial(load_stored, DeepSeekModel))
    for load in loaders:
        with pytest.raises(CheckpointError, match="set tie_word_embeddings to false in config"):
            load(tmp_path, dtype=torch.float32)

    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": False}))
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(reference.lm_head.weight, head)
    ids = torch.randint(0, 211, (1, 30))
    for load in loaders:
        logits = load(tmp_path, dtype=torch.float32)(ids).logits
        torch.testing.assert_close(logits, reference(ids).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_padding_changes_nothing(name: str, tmp_path: Path) -> None:
    reference = random_checkpoint(name, tmp_path)
    model = DeepSeekModel.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.randint(0, 211, (2, 40))
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = reference(ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(
        model(ids, attention_mask=mask).logits[mask.bool()],
        expected[mask.bool()],
        atol=1e-4,
        rtol=0,
    )
    alone = model(ids[:1, 13:]).logits
    torch.testing.assert_close(
        model(ids, attention_mask=mask).logits[:1, 13:], alone, atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_save_and_load_keeps_every_bit(name: str, tmp_path: Path) -> None:
    random_checkpoint(name, tmp_path / "theirs")
    model = DeepSeekModel.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    model.save_pretrained(tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    assert isinstance(again, DeepSeekModel)
    ids = torch.randint(0, 211, (2, 30))
    assert torch.equal(again(ids).logits, model(ids).logits)
