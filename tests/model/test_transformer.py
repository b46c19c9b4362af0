"""Properties of the model itself, on a small random mixture of experts."""

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache, Trainer, TrainingArguments

from deepseek import DeepSeekModel, ModelConfig
from deepseek.errors import CheckpointError, ConfigError
from deepseek.model.kv_cache import KVCache


def small_config(**changes: Any) -> ModelConfig:
    shape: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "num_experts": 8,
        "expert_dim": 16,
        "num_shared_experts": 1,
        "initializer_range": 0.15,
    }
    return ModelConfig(**(shape | changes))


@pytest.fixture(scope="module")
def model() -> DeepSeekModel:
    torch.manual_seed(0)
    return DeepSeekModel(small_config()).eval()


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(1, 47), max_size=6), seed=st.integers(0, 1000))
def test_cached_steps_equal_one_forward(cuts: list[int], seed: int) -> None:
    torch.manual_seed(0)
    model = DeepSeekModel(small_config()).eval()
    ids = torch.randint(0, 97, (2, 48), generator=torch.Generator().manual_seed(seed))
    bounds = [0, *sorted(set(cuts)), 48]
    cache = KVCache()
    with torch.no_grad():
        parts = [model(ids[:, a:b], cache=cache).logits for a, b in pairwise(bounds)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(ids).logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_packed_documents_do_not_see_each_other(model: DeepSeekModel) -> None:
    ids = torch.randint(0, 97, (1, 40))
    positions = torch.cat((torch.arange(25), torch.arange(15)))[None]
    packed = model(ids, position_ids=positions).logits
    torch.testing.assert_close(packed[:, :25], model(ids[:, :25]).logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(packed[:, 25:], model(ids[:, 25:]).logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_later_tokens_never_change_earlier_ones(model: DeepSeekModel) -> None:
    ids = torch.randint(0, 97, (1, 40))
    changed = ids.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % 97
    torch.testing.assert_close(
        model(ids).logits[:, :20], model(changed).logits[:, :20], atol=1e-6, rtol=0
    )


@torch.no_grad()
def test_log_probs_agree_with_the_loss(model: DeepSeekModel) -> None:
    ids = torch.randint(0, 97, (2, 30))
    log_probs = model.log_probs(ids)
    assert log_probs.shape == (2, 29)
    torch.testing.assert_close(-log_probs.mean(), model(ids, labels=ids).loss)


def test_sharing_registers_each_pool_once(tmp_path: Path) -> None:
    model = DeepSeekModel(small_config(expert_sharing=2)).eval()
    pools = [name for name, _ in model.named_parameters() if name.endswith("gate_up_proj")]
    assert pools == ["expert_pools.0.gate_up_proj", "expert_pools.1.gate_up_proj"]
    model.save_pretrained(tmp_path)
    ids = torch.randint(0, 97, (2, 30))
    assert torch.equal(
        DeepSeekModel.from_pretrained(tmp_path, dtype=torch.float32)(ids).logits, model(ids).logits
    )


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    torch.manual_seed(0)
    model = DeepSeekModel(small_config()).train()
    twin = copy.deepcopy(model)
    twin.activation_checkpointing_enable()
    ids = torch.randint(0, 97, (2, 30))
    for one in (model, twin):
        one(ids, labels=ids).loss.backward()
    for (name, mine), (_, other) in zip(
        model.named_parameters(), twin.named_parameters(), strict=True
    ):
        torch.testing.assert_close(mine.grad, other.grad, msg=name)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_layers_add_no_statistics(reentrant: bool) -> None:
    model = DeepSeekModel(small_config()).train()
    how = {"use_reentrant": reentrant}
    model.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
    model.enable_input_require_grads()
    output = model(torch.arange(20)[None], labels=torch.arange(20)[None])
    stats = output.router_stats
    output.loss.backward()
    assert [entry.layer_idx for entry in stats] == [0, 1, 2, 3]


def test_works_with_peft(model: DeepSeekModel) -> None:
    ids = torch.randint(0, 97, (2, 20))
    expected = model(ids).logits
    tuned = get_peft_model(
        copy.deepcopy(model),
        LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    torch.testing.assert_close(tuned(ids).logits, expected)
    tuned(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for n, p in tuned.named_parameters() if "lora_B" in n)
    assert tuned.generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape == (2, 23)


@pytest.mark.parametrize("micro_batch", [8, 2])
def test_a_trainer_of_hugging_face_accumulates_gradients(micro_batch: int, tmp_path: Path) -> None:
    """It passes the number of labels of a whole step, and does not divide the loss itself."""
    torch.manual_seed(0)
    model = DeepSeekModel(small_config())
    ids_BT = torch.randint(0, 97, (8, 12))
    labels_BT = ids_BT.clone()
    labels_BT[:, 0] = -100  # Hugging Face also counts the first labels, which nothing predicts
    expected = float(model(ids_BT, labels=labels_BT).loss.detach())
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=8 // micro_batch,
        max_steps=1,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = zip(ids_BT, labels_BT, strict=True)
    data = [{"input_ids": ids_T, "labels": labels_T} for ids_T, labels_T in rows]
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-3)


def test_a_static_cache_is_refused(model: DeepSeekModel) -> None:
    """Queries would attend to its empty slots."""
    ids = torch.randint(0, 97, (2, 8))
    with pytest.raises(ConfigError, match="slots that no token has filled"):
        model(ids, cache=StaticCache(model.config, max_cache_len=32))
    assert torch.equal(model(ids, cache=DynamicCache()).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"atention_mask": torch.ones(1, 3)}, "no argument 'atention_mask'; perhaps 'attention_m"),
        ({"output_attentions": True}, "output_attentions=True is not supported"),
        ({"is_causal": False}, "attention is causal; leave is_causal out"),
        ({"cu_seq_lens_q": torch.tensor([0, 3])}, "told apart by position_ids"),
    ],
)
def test_an_argument_that_would_be_ignored_is_refused(
    model: DeepSeekModel, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        model(torch.tensor([[1, 2, 3]]), **arguments)


def test_arguments_for_models_of_any_family_are_accepted(model: DeepSeekModel) -> None:
    ids = torch.tensor([[1, 2, 3]])
    positions = torch.tensor([[0, 1, 0]])
    neutral = {"output_attentions": False, "is_causal": True, "token_type_ids": ids * 0}
    assert torch.equal(model(ids, **neutral, cache_position=ids[0]).logits, model(ids).logits)
    packed = model(ids, position_ids=positions, cu_seq_lens_q=torch.tensor([0, 2, 3]))
    assert torch.equal(packed.logits, model(ids, position_ids=positions).logits)


@pytest.mark.parametrize("kind", ["static", "quantized", "offloaded"])
def test_generate_has_a_cache_of_its_own(model: DeepSeekModel, kind: str) -> None:
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(ConfigError, match=f"cache_implementation='{kind}' is not supported"):
        model.generate(ids, max_new_tokens=2, cache_implementation=kind)
    with pytest.raises(ConfigError, match="never computed as a matrix"):
        model.generate(ids, max_new_tokens=2, output_attentions=True, return_dict_in_generate=True)


def test_a_cache_kind_of_the_checkpoint_is_left_out(model: DeepSeekModel, tmp_path: Path) -> None:
    """Gemma's generation config names the cache of its stock model."""
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"cache_implementation": "hybrid"}')
    loaded = DeepSeekModel.from_pretrained(tmp_path)
    assert loaded.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2).shape[1] > 3


def test_another_attention_implementation_is_refused(model: DeepSeekModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    for loader in (DeepSeekModel, AutoModelForCausalLM):
        with pytest.raises(ConfigError, match="attn_implementation='eager' is not supported"):
            loader.from_pretrained(tmp_path, attn_implementation="eager")
        assert loader.from_pretrained(tmp_path, attn_implementation="sdpa").config.num_experts == 8


def test_a_cache_passed_to_generate_is_known_as_its_callers(model: DeepSeekModel) -> None:
    """Hugging Face then leaves only returned tokens in it."""
    cache = KVCache()
    model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, cache=cache)
    assert cache._is_user_defined


@torch.no_grad()
def test_beam_search_reorders_the_cache(model: DeepSeekModel) -> None:
    ids = torch.randint(0, 97, (2, 10))
    cached = model.generate(ids, num_beams=3, max_new_tokens=8, do_sample=False, pad_token_id=0)
    plain = model.generate(
        ids, num_beams=3, max_new_tokens=8, do_sample=False, pad_token_id=0, use_cache=False
    )
    assert torch.equal(cached, plain)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"routing_strategy": "dynamc"}, "perhaps 'dynamic' is meant"),
        ({"routing_strateg": "dynamic"}, "perhaps 'routing_strategy' is meant"),
        ({"attention": "sparse"}, "valid: full"),
        ({"num_experts": 4}, "expert_dim"),
        ({"num_experts": 4, "expert_dim": 8, "max_experts": 5}, "max_experts=5"),
        ({"num_experts": 8, "expert_dim": 8, "routing_threshold": 1.5}, "routing_threshold=1.5"),
        ({"num_experts": 8, "expert_dim": 8, "target_experts": 7.0}, "target_experts=7.0"),
        (
            {
                "num_experts": 8,
                "expert_dim": 8,
                "max_experts": 3,
                "num_expert_groups": 4,
                "routing_strategy": "topk",
            },
            "max_experts=3 must be at most 2",
        ),
        ({"hidden_size": 0}, "hidden_size=0"),
        ({"num_attention_heads": 8, "num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "rope_type"),
    ],
)
def test_config_names_the_field_and_the_mend(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told.replace("[", r"\[")):
        ModelConfig(**fields)


def test_fewer_experts_than_the_usual_bound_need_no_further_field(tmp_path: Path) -> None:
    assert ModelConfig().max_experts == ModelConfig(num_experts=16, expert_dim=8).max_experts == 5
    few = ModelConfig(num_experts=2, expert_dim=8, routing_strategy="dynamic")
    assert (few.max_experts, ModelConfig.from_dict(few.to_dict()).max_experts) == (2, 2)
    DeepSeekModel(small_config(num_experts=0, num_shared_experts=0)).save_pretrained(tmp_path)
    assert DeepSeekModel.from_pretrained(tmp_path, config=few).config.max_experts == 2


def test_preset_names_are_checked() -> None:
    with pytest.raises(ConfigError, match="deepseek-nano"):
        ModelConfig.preset("deepseek-nono")


def test_config_round_trip_keeps_aliases(tmp_path: Path) -> None:
    shape = small_config().given
    del shape["max_position_embeddings"]
    config = ModelConfig(**shape, max_len=77)
    config.save_pretrained(tmp_path)
    again = ModelConfig.from_pretrained(tmp_path)
    assert again.max_position_embeddings == again.max_len == 77
    assert "_given" not in again.to_dict()


def test_checkpoint_errors_are_plain(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="gpt2"):
        DeepSeekModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "values",
    [
        {"rope_type": "default", "rope_theta": 10**30},
        {"rope_type": "linear", "rope_theta": 10**4, "factor": 10**25},
        {"rope_type": "yarn", "rope_theta": 10**25, "factor": 10**25, "beta_fast": 10**30},
    ],
    ids=lambda values: values["rope_type"],
)
def test_whole_numbers_of_any_size_are_rotary_parameters(values: dict[str, object]) -> None:
    config = small_config(rope_parameters=values)
    logits = DeepSeekModel(config).eval()(torch.tensor([[1, 2, 3]])).logits
    assert logits.isfinite().all()


LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize("stored", [{}, LINEAR, LLAMA3])
@pytest.mark.parametrize("scaling", [None, LINEAR, LLAMA3, LINEAR | {"rope_theta": 500.0}])
@pytest.mark.parametrize("theta", [None, 123.0])
def test_older_names_override_the_rotary_parameters_of_a_checkpoint(
    stored: dict[str, Any], scaling: dict[str, Any] | None, theta: float | None
) -> None:
    context = {"original_max_position_embeddings": 64}
    checkpoint = small_config(rope_parameters={"rope_theta": 1e6, **stored, **context}).to_dict()
    older = {"rope_theta": theta, "rope_scaling": scaling and scaling | context}
    older = {name: value for name, value in older.items() if value is not None}
    merged = ModelConfig(**older).merged_into({"rope_parameters": checkpoint["rope_parameters"]})
    kind = {"rope_type": "default"}
    expected = kind | {"rope_theta": theta or 1e6} | (scaling or stored) | context
    assert merged.rope_parameters == expected


@torch.no_grad()
def test_an_overridden_rotary_base_changes_the_logits(tmp_path: Path) -> None:
    DeepSeekModel(small_config()).save_pretrained(tmp_path)
    ids = torch.randint(0, 97, (1, 40))
    given = [{"rope_theta": 123.0}, {"rope_parameters": {"rope_theta": 123.0}}, {}]
    older, newer, stored = (
        DeepSeekModel.from_pretrained(tmp_path, config=ModelConfig(**fields))(ids).logits
        for fields in given
    )
    assert torch.equal(older, newer)
    assert not torch.allclose(older, stored, atol=1e-3)


def test_a_config_leaves_the_mapping_it_is_given_alone() -> None:
    scaling = dict(LINEAR)
    small_config(rope_scaling=scaling)
    assert scaling == LINEAR


def test_contradicting_config_is_refused(tmp_path: Path) -> None:
    DeepSeekModel(small_config(num_experts=0, num_shared_experts=0)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="hidden_size=64 contradicts"):
        DeepSeekModel.from_pretrained(tmp_path, config=ModelConfig(hidden_size=64))


def test_upcycling_keeps_logits_and_gives_the_router_a_gradient(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = DeepSeekModel(small_config(num_experts=0, num_shared_experts=0)).eval()
    dense.save_pretrained(tmp_path)
    sparse = DeepSeekModel.from_pretrained(
        tmp_path,
        config=ModelConfig(num_experts=16, expert_dim=8, routing_strategy="dynamic"),
        dtype=torch.float32,
    )
    ids = torch.randint(0, 97, (2, 40))
    torch.testing.assert_close(sparse(ids).logits, dense(ids).logits, atol=1e-5, rtol=0)
    sparse(ids, labels=ids).loss.backward()
    for block in sparse.layers:
        assert block.feed_forward.router.weight.grad.norm() > 0
