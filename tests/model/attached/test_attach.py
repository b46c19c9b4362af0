"""Where experts attach, what is refused and why, and loading folders of any family."""

import asyncio
import contextvars
import copy
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attached_fixtures import attached, plug_random
from peft import LoraConfig, get_peft_model
from tiny_families import SMALL, tiny_family
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    OPTConfig,
    PreTrainedModel,
)

import deepseek
from deepseek.checkpoint.store import read_json
from deepseek.errors import CheckpointError, ConfigError, PackError
from deepseek.model.attached.model import AttachedModel
from deepseek.model.attached.sites import find_sites
from deepseek.model.experts import ExpertSet, linear_hooks
from deepseek.model.language_model import expert_beside, layers_in, load_language_model
from deepseek.model.passes import begin
from deepseek.model.transformer import DeepSeekModel

IDS = torch.randint(3, 300, (1, 12), generator=torch.Generator().manual_seed(1))


def renamed(name: str) -> PreTrainedModel:
    """Return a Llama whose feed-forward modules have another name, as in an unknown family."""
    torch.manual_seed(0)  # with other weights a random gate may fire nowhere
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
    for block in model.model.layers:
        setattr(block, name, block.mlp)
        ffn = block._modules.pop("mlp")
        object.__setattr__(block, "mlp", ffn)
    return model


def opt() -> PreTrainedModel:
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
    config = OPTConfig(vocab_size=300, word_embed_proj_dim=32, max_position_embeddings=64, **sizes)
    return AutoModelForCausalLM.from_config(config).eval()


def mamba() -> PreTrainedModel:
    config = MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=4)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (opt, "OPTForCausalLM"),
        (mamba, "MambaForCausalLM"),
        (lambda: BertModel(BertConfig(num_hidden_layers=1)), "not to a BertModel"),
        (lambda: nn.Linear(2, 2), "not to a Linear"),
    ],
)
def test_what_has_no_place_for_experts_is_refused_by_name(model: Any, message: str) -> None:
    refused = model()
    with pytest.raises(ConfigError, match=message):
        deepseek.attach(refused)
    assert not hasattr(refused, "experts")
    assert not any(module._forward_hooks for module in refused.modules())


def test_modules_without_a_known_name_are_found_by_what_they_do() -> None:
    model = renamed("transformation")
    sites = find_sites(model)
    assert [site.path for site in sites] == [
        f"model.layers.{layer}.transformation" for layer in range(4)
    ]
    assert not any(module._forward_hooks for module in model.modules())
    logits = model(IDS).logits
    plugged = attached(model)
    plug_random(plugged)
    assert not torch.equal(plugged(IDS).logits, logits)


def test_a_mixed_model_names_its_sites() -> None:
    model = deepseek.attach(tiny_family("nemotron_h"))
    assert isinstance(model.experts, ExpertSet)
    assert [(site.layer, site.path) for site in model.experts.sites] == [
        (1, "model.layers.1.mixer"),
        (3, "model.layers.3.mixer"),
    ]
    with pytest.raises(ConfigError, match=r"Layer 2 has no feed-forward module.*among 1, 3"):
        expert_beside(model, "code", (2,), 8)


def test_attaching_twice_and_detaching_what_is_not() -> None:
    model = tiny_family("olmo2")
    with pytest.raises(ConfigError, match="nothing to detach"):
        deepseek.detach(model)
    attached_once = deepseek.attach(model)
    experts = attached_once.experts
    assert deepseek.attach(model).experts is experts
    with pytest.raises(PackError, match="not loaded from a folder"):
        _ = experts.base


@torch.no_grad()
def test_beside_an_adapter_of_peft() -> None:
    model = attached(tiny_family("olmo2"))
    plug_random(model)
    expected = model(IDS).logits
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"]))
    assert torch.equal(wrapped(IDS).logits, expected)
    model.experts.arm(None)
    assert not torch.equal(wrapped(IDS).logits, expected)


def test_static_caches_and_cropping_are_refused_while_experts_are_armed() -> None:
    model = attached(tiny_family("olmo2"))
    plug_random(model)
    with pytest.raises(ConfigError, match="cache_implementation"):
        model.generate(IDS, max_new_tokens=4, cache_implementation="static")
    cache = model(IDS).cache
    with pytest.raises(ConfigError, match="cannot be cropped"):
        cache.crop(-2)
    assert not cache.is_croppable
    model.experts.arm(None)
    assert model(IDS).cache.is_croppable
    model.generate(IDS, max_new_tokens=4, cache_implementation="static")
    model(IDS).cache.crop(-2)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_is_refused_while_experts_are_armed(reentrant: bool) -> None:
    model = attached(tiny_family("olmo2")).train()
    plug_random(model)
    how = {"use_reentrant": reentrant}
    model.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
    embeds = model.get_input_embeddings()(IDS)  # reentrant checkpoints need an input with grad
    for run in (lambda: model(inputs_embeds=embeds), lambda: begin(model, IDS).finish()):
        with pytest.raises(ConfigError, match="activation_checkpointing_disable"):
            run()
    assert not model.expert_hooks._current.passes  # no state is left for the next pass
    with torch.no_grad():
        assert model(IDS).experts is not None
    model.eval()
    assert model(IDS).experts is not None
    model.train()
    with model.experts.arming(None):
        model(inputs_embeds=embeds, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.model.layers.parameters())
    model.activation_checkpointing_disable()
    assert model(IDS).experts is not None


def test_a_new_expert_starts_from_rows_of_the_models_own_weights() -> None:
    for family, fused in (("olmo2", False), ("phi3", True)):
        model = attached(tiny_family(family))
        module = expert_beside(model, "code", (1, 2), 16, seed=3)
        mlp = model.model.layers[1].mlp
        gate, up = (
            mlp.gate_up_proj.weight.chunk(2)
            if fused
            else (mlp.gate_proj.weight, mlp.up_proj.weight)
        )
        rows = module.at(1).gate_up_proj
        pairs = torch.cat([gate, up], dim=1)
        for row in torch.cat(rows.chunk(2), dim=1):
            assert (pairs == row).all(dim=1).any()
        assert module.at(1).down_proj.abs().sum() == 0
    mixture = expert_beside(attached(tiny_family("gpt_oss")), "code", (1,), 16)
    assert mixture.at(1).gate_up_proj.abs().sum() > 0


def test_a_folder_of_another_family_loads_as_its_stock_model(tmp_path: Path) -> None:
    stock = tiny_family("smollm3")
    stock.save_pretrained(tmp_path)
    model = load_language_model(tmp_path, dtype="float32")
    assert isinstance(model, AttachedModel) and isinstance(model, type(stock))
    assert torch.equal(model(IDS).logits, stock(IDS).logits)
    base = model.experts.base
    assert (base.hidden_size, base.num_layers) == (32, 4)
    assert base.attached == "SmolLM3ForCausalLM: mlp"
    assert layers_in(tmp_path) == (0, 1, 2, 3)
    by_hand = deepseek.attach(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert by_hand.experts.base == base
    with pytest.raises(ConfigError, match="keeps its own architecture"):
        load_language_model(tmp_path, config=deepseek.ModelConfig())


@pytest.mark.parametrize("family", ["gpt2", "nemotron_h"])
def test_a_pack_made_beside_a_folder_names_its_base(family: str, tmp_path: Path) -> None:
    tiny_family(family).save_pretrained(tmp_path)
    model = load_language_model(tmp_path)
    assert layers_in(tmp_path) == model.experts.sites.indices
    module = expert_beside(model, "code", layers_in(tmp_path)[-1:], 8)
    model.experts.plug(module.to_pack(model.experts.base, "Apache-2.0"))
    other = model.experts.base.model_copy(update={"attached": "Other: mlp"})
    with pytest.raises(PackError, match="its attached"):
        model.experts.plug(module.to_pack(other, "Apache-2.0"))


def test_our_families_stay_ours_unless_we_cannot_compute_them(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(tmp_path / "plain")
    assert isinstance(load_language_model(tmp_path / "plain"), DeepSeekModel)
    stock = LlamaForCausalLM(LlamaConfig(**SMALL, mlp_bias=True))
    stock.save_pretrained(tmp_path / "biased")
    model = load_language_model(tmp_path / "biased", dtype="float32")
    assert isinstance(model, LlamaForCausalLM)
    assert torch.equal(model(IDS).logits, stock(IDS).logits)


def test_damaged_and_foreign_folders_are_one_sentence(tmp_path: Path) -> None:
    tiny_family("olmo2").save_pretrained(tmp_path)
    config = read_json(tmp_path / "config.json")

    def load(**changes: Any) -> None:
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        load_language_model(tmp_path)

    with pytest.raises(CheckpointError, match="'nosuch' are not supported"):
        load(model_type="nosuch", auto_map={"AutoModelForCausalLM": "evil.Model"})
    with pytest.raises(CheckpointError, match="do not match"):
        load(num_hidden_layers=5)
    with pytest.raises(CheckpointError, match="cannot load"):
        load(hidden_size=64)
    (tmp_path / "model.safetensors").write_bytes(b"12345678")
    with pytest.raises(CheckpointError, match="cannot load"):
        load()


@torch.no_grad()
@pytest.mark.parametrize("armed_before", [True, False])
def test_an_interruption_leaves_no_pass_behind(armed_before: bool) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    model = attached(tiny_family("olmo2"))
    plain = model(IDS).logits
    plug_random(model)
    with_expert = model(IDS).logits
    assert not torch.equal(plain, with_expert)
    model.experts.arm("code" if armed_before else None)
    for module in (model.model.layers[2], model.lm_head):
        handle = module.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model.generate(IDS, max_new_tokens=2)
        with pytest.raises(KeyboardInterrupt), model.expert_hooks.running(None):
            model(IDS)
        handle.remove()
        model.experts.arm(None if armed_before else "code")
        assert torch.equal(model(IDS).logits, plain if armed_before else with_expert)
        assert not model.expert_hooks._current.passes
        model.experts.arm("code" if armed_before else None)


@torch.no_grad()
def test_a_block_without_experts_goes_on_after_an_interruption_inside_it() -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    model = attached(tiny_family("olmo2"))
    plain = model(IDS).logits
    plug_random(model)
    with model.expert_hooks.running(None):
        handle = model.lm_head.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(IDS)
        handle.remove()
        assert torch.equal(model(IDS).logits, plain)
    assert not torch.equal(model(IDS).logits, plain)


@torch.no_grad()
@pytest.mark.parametrize("first_runs_alone", [True, False])
def test_an_interruption_in_an_asyncio_task_does_not_break_the_next(first_runs_alone: bool) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    async def logits() -> torch.Tensor:
        return model(IDS).logits

    model = attached(tiny_family("olmo2"))
    plain = model(IDS).logits
    handle = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(IDS) if first_runs_alone else asyncio.run(logits())
    handle.remove()
    assert torch.equal(asyncio.run(logits()), plain)
    assert torch.equal(model(IDS).logits, plain)


def test_a_scope_that_is_ended_late_leaves_a_later_one_alone() -> None:
    """One model's interrupted pass is ended while another model's pass is running."""
    stale, running = SimpleNamespace(adapts=True), SimpleNamespace(adapts=True)
    left = linear_hooks.adapting(stale)
    with linear_hooks.adapting(running):
        contextvars.copy_context().run(left.__enter__)
        left.__exit__(None, None, None)
        assert linear_hooks._running.get() is running
    assert linear_hooks._running.get() is None


@torch.no_grad()
def test_a_cache_is_serialised_and_a_model_is_refused_in_one_sentence() -> None:
    model = attached(tiny_family("olmo2"))
    cache = model(IDS, use_cache=True).past_key_values
    written = io.BytesIO()
    torch.save(cache, written)
    written.seek(0)
    again = torch.load(written, weights_only=False)
    assert type(again) is type(cache)
    expected = model(IDS[:, :1], past_key_values=copy.deepcopy(cache)).logits
    assert torch.equal(model(IDS[:, :1], past_key_values=again).logits, expected)
    with pytest.raises(ConfigError, match="write it with save_pretrained"):
        torch.save(model, io.BytesIO())
