"""LoRA adapters on a live model: PEFT's logits, bit-identical to the base if unarmed, several at
once.
"""

import copy
import gc
import pickle
import weakref
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny_adapter import ATTENTION, peft_logits, save_adapter, save_llama
from tiny_expert import save_expert
from torch import nn
from transformers import LlamaForCausalLM

from deepseek.engine.adapters import import_adapter
from deepseek.engine.load import load
from deepseek.errors import ConfigError, PackError
from deepseek.model.attached.model import attach
from deepseek.model.config import ModelConfig
from deepseek.model.experts.linear_hooks import HookTable, SiteHook
from deepseek.model.kv_cache import KVCache
from deepseek.model.transformer import DeepSeekModel

KINDS = {
    "attention": {},
    "all-linear": {"target_modules": "all-linear", "r": 4, "lora_alpha": 12},
    "regex": {"target_modules": r".*\.(q|v|down)_proj", "lora_alpha": 3},
    "rslora": {"use_rslora": True, "r": 16, "lora_alpha": 5},
    "patterns": {
        "rank_pattern": {"q_proj": 2, r"layers\.[01]\.self_attn\.o_proj": 5},
        "alpha_pattern": {r"^model\.layers\.1\.self_attn\.k_proj": 40, "k_proj": 1},
    },
    "some layers": {"layers_to_transform": [0, 2], "target_modules": [*ATTENTION, "up_proj"]},
}
IDS = torch.arange(3, 43).view(2, 20)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"))


def imported(llama: Path, folder: Path, name: str, **how) -> Path:
    adapter = save_adapter(llama, folder / f"{name}-peft", **how)
    return import_adapter(adapter, name=name, base=llama, out=folder / f"{name}.safetensors")


def logits(model: DeepSeekModel, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_peft(kind: str, llama: Path, tmp_path: Path) -> None:
    adapter = save_adapter(llama, tmp_path / "peft", **KINDS[kind])
    model = load(llama, dtype="float32").model
    base = logits(model)
    pack = import_adapter(adapter, name="mine", base=llama, out=tmp_path / "mine.safetensors")
    info = model.experts.plug(pack)
    assert info.kind == "lora"
    assert not info.armed
    assert torch.equal(logits(model), base)
    model.experts.arm("mine")
    expected = peft_logits(llama, adapter, IDS)
    assert (logits(model) - expected).abs().max() <= 1e-4
    assert (expected - base).abs().max() > 0.1
    model.experts.unplug("mine")
    assert torch.equal(logits(model), base)


def plugged(llama: Path, folder: Path, *names: str, dtype: str = "float32") -> DeepSeekModel:
    """Return the model with different adapters plugged but not armed."""
    model = load(llama, dtype=dtype).model
    for seed, name in enumerate(names, 1):
        model.experts.plug(imported(llama, folder, name, seed=seed))
    return model


def test_several_adapters_add_up_in_any_plug_order(llama: Path, tmp_path: Path) -> None:
    model = plugged(llama, tmp_path, "one", "two")
    turned = load(llama, dtype="float32").model
    for name in ("two", "one"):
        turned.experts.plug(tmp_path / f"{name}.safetensors")
    each = []
    for names in (["one"], ["two"], ["one", "two"]):
        model.experts.arm(names)
        turned.experts.arm(names)
        assert torch.equal(logits(model), logits(turned))
        each.append(logits(model))
    assert len({tensor.sum().item() for tensor in each}) == 3


def test_weights_scale_what_an_adapter_adds(llama: Path, tmp_path: Path) -> None:
    """PEFT with half the alpha equals the adapter with weight 0.5."""
    model = plugged(llama, tmp_path, "one")
    model.experts.arm("one")
    full = logits(model)
    model.experts.arm({"one": 1.0})
    assert torch.equal(logits(model), full)
    halved = save_adapter(llama, tmp_path / "half", seed=1, lora_alpha=4)
    model.experts.arm({"one": 0.5})
    assert (logits(model) - peft_logits(llama, halved, IDS)).abs().max() <= 1e-4
    assert model.experts.list()[0].weight == 0.5


def test_an_adapter_runs_beside_experts(llama: Path, tmp_path: Path) -> None:
    loaded = load(llama, dtype="float32")
    model = loaded.model
    model.experts.plug(imported(llama, tmp_path, "one"))
    model.experts.plug(save_expert(loaded, "code", tmp_path))
    results = []
    for names in (None, ["one"], ["code"], ["one", "code"]):
        with model.experts.arming(names):
            results.append(logits(model))
    assert len({tensor.sum().item() for tensor in results}) == 4
    assert model.experts.arm("auto") == ("code",)
    assert model.experts.arm(["auto", "one"]) == ("code", "one")
    assert torch.equal(logits(model), results[3])


def test_auto_arms_an_adapter_that_was_imported_for_it(llama: Path, tmp_path: Path) -> None:
    adapter = save_adapter(llama, tmp_path / "peft")
    pack = import_adapter(
        adapter, name="always", base=llama, auto=True, out=tmp_path / "a.safetensors"
    )
    model = load(llama, dtype="float32").model
    assert model.experts.plug(pack).armed


@pytest.mark.parametrize("cut", [1, 7])
def test_decoding_in_pieces_equals_one_pass(cut: int, llama: Path, tmp_path: Path) -> None:
    model = plugged(llama, tmp_path, "one")
    model.experts.arm("one")
    whole = logits(model)
    cache = KVCache()
    with torch.no_grad():
        parts = [model(part, cache=cache).logits for part in IDS.split(cut, dim=1)]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-4)


def test_a_sequence_in_flight_keeps_its_adapter(llama: Path, tmp_path: Path) -> None:
    model = plugged(llama, tmp_path, "one")
    model.experts.arm("one")
    cache = KVCache()
    with torch.no_grad():
        whole = model(IDS).logits
        model(IDS[:, :9], cache=cache)
        model.experts.unplug("one")
        gc.collect()
        rest = model(IDS[:, 9:], cache=cache).logits
    assert torch.allclose(rest, whole[:, 9:], atol=1e-4)


def hooks(model: DeepSeekModel) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_unplugging_leaves_no_trace(llama: Path, tmp_path: Path) -> None:
    model = load(llama, dtype="float32").model
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.experts.plug(imported(llama, tmp_path, "one"))
    model.experts.plug(imported(llama, tmp_path, "two", target_modules=[*ATTENTION, "up_proj"]))
    assert hooks(model) == 3 * 5
    assert model.state_dict().keys() == state.keys()
    pickle.dumps(model.layers)
    model.experts.unplug("two")
    assert hooks(model) == 3 * 4
    model.experts.unplug("one")
    assert hooks(model) == 0
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_copied_model_applies_a_change_once(llama: Path, tmp_path: Path) -> None:
    model = plugged(llama, tmp_path, "one")
    model.experts.arm("one")
    expected = logits(model)
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), expected)
    copied.experts.unplug("one")
    copied.experts.plug(tmp_path / "one.safetensors")
    copied.experts.arm("one")
    assert torch.equal(logits(copied), expected)
    copied.experts.unplug("one")
    assert not torch.equal(logits(copied), expected)
    assert torch.equal(logits(model), expected)


def test_an_adapter_that_comes_while_the_last_one_is_freed_has_its_hook() -> None:
    layer, table = nn.Linear(2, 2), HookTable()
    found: list[SiteHook] = []

    def plug(_: object) -> None:  # as another thread might, just before the finaliser runs
        found.append(table.hook("site", layer))

    old = table.hook("site", layer)
    reference = weakref.ref(old, plug)
    del old
    assert reference() is None
    assert len(layer._forward_hooks) == 1
    assert table.hook("site", layer) is found[0]
    found.clear()
    assert not layer._forward_hooks


def test_forced_adapter_acts_alone(llama: Path, tmp_path: Path) -> None:
    model = plugged(llama, tmp_path, "one", "two")
    model.experts.arm("one")
    expected = logits(model)
    model.experts.arm("two")
    with model.experts.forced("one"):
        assert torch.equal(logits(model), expected)


def test_an_upcycled_model_takes_an_adapter_of_its_dense_base(llama: Path, tmp_path: Path) -> None:
    adapter = save_adapter(llama, tmp_path / "peft", target_modules="all-linear")
    pack = import_adapter(adapter, name="mine", base=llama, out=tmp_path / "mine.safetensors")
    config = ModelConfig(num_experts=8, expert_dim=16)
    model = load(llama, config=config, dtype="float32").model
    model.experts.plug(pack)
    model.experts.arm("mine")
    assert (logits(model) - peft_logits(llama, adapter, IDS)).abs().max() <= 1e-4


def test_a_model_without_the_layers_refuses_the_adapter(llama: Path, tmp_path: Path) -> None:
    pack = imported(llama, tmp_path, "one", target_modules=["up_proj"])
    model = load(llama, dtype="float32").model
    for block in model.layers:
        block.feed_forward.up_proj = torch.nn.Identity()
    with pytest.raises(PackError, match=r"layers\.0\.mlp\.up_proj, which is no linear layer"):
        model.experts.plug(pack)
    assert model.experts.list() == ()


@pytest.mark.parametrize("weight", [0, -1, 2.5, float("nan"), float("inf"), "1", True])
def test_weights_out_of_range_are_refused(weight: object, llama: Path, tmp_path: Path) -> None:
    model = plugged(llama, tmp_path, "one")
    with pytest.raises(ConfigError, match="above 0 and at most 2"):
        model.experts.arm({"one": weight})
    with pytest.raises(ConfigError, match="above 0 and at most 2"):
        model.experts.choose({"one": weight})
    assert not model.experts.list()[0].armed


def test_factors_are_part_of_the_cache_key(llama: Path, tmp_path: Path) -> None:
    model = plugged(llama, tmp_path, "one", "two")
    keys = {
        model.experts.choose(arm).identity
        for arm in (["one"], ["two"], ["one", "two"], {"one": 0.5}, {"one": 0.5, "two": 1.0})
    }
    assert len(keys) == 5
    assert model.experts.choose({"one": 1.0}).identity == model.experts.choose("one").identity


def test_an_attached_model_takes_the_same_pack(llama: Path, tmp_path: Path) -> None:
    adapter = save_adapter(llama, tmp_path / "peft", target_modules="all-linear")
    pack = import_adapter(adapter, name="one", base=llama, out=tmp_path / "one.safetensors")
    model = attach(LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32).eval())
    base = logits(model)
    model.experts.plug(pack)
    assert torch.equal(logits(model), base)
    model.experts.arm("one")
    expected = peft_logits(llama, adapter, IDS)
    assert (logits(model) - expected).abs().max() <= 1e-5
    text = model.generate(IDS[:1, :5], max_new_tokens=8, do_sample=False)
    model.experts.unplug("one")
    stock = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(llama), str(adapter)).eval()
    assert torch.equal(text, stock.generate(IDS[:1, :5], max_new_tokens=8, do_sample=False))
    assert torch.equal(logits(model), base)


@pytest.mark.slow
def test_logits_of_the_real_base_are_those_of_peft(smollm2: Path, tmp_path: Path) -> None:
    adapter = save_adapter(smollm2, tmp_path / "peft", std=0.03, target_modules="all-linear")
    pack = import_adapter(adapter, name="one", base=smollm2, out=tmp_path / "one.safetensors")
    model = load(smollm2, dtype="float32").model
    base = logits(model)
    model.experts.plug(pack)
    assert torch.equal(logits(model), base)
    model.experts.arm("one")
    expected = peft_logits(smollm2, adapter, IDS)
    assert (logits(model) - expected).abs().max() <= 1e-4
    assert (expected - base).abs().max() > 0.1
