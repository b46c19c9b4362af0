"""Experts on stock models: bit-identical to stock without experts; with them, the same text with a
cache, in beams, in padded batches and after a copy.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from attached_fixtures import attached, plug_random
from safetensors.torch import load_file
from tiny_families import FAMILIES, tiny_family
from transformers import PreTrainedModel

from deepseek.model.attached.model import detach

MIXED_LAYERS = {"nemotron_h": (1, 3)}
"""Families in which not every layer has a feed-forward network -> layers that have one."""


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def stock(family: str) -> PreTrainedModel:
    return tiny_family(family)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 300, (2, 20), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_bits_are_the_stock_models_unless_an_expert_is_armed(
    family: str, stock: PreTrainedModel, ids: torch.Tensor
) -> None:
    kind, keys = type(stock), list(stock.state_dict())
    logits = stock(ids).logits
    text = stock.generate(ids, max_new_tokens=6, do_sample=False)
    model = attached(stock)
    assert model.experts.sites.indices == MIXED_LAYERS.get(family, (0, 1, 2, 3))
    assert isinstance(model, kind)
    assert torch.equal(model(ids).logits, logits)

    plug_random(model)
    output = model(ids)
    assert not torch.equal(output.logits, logits)
    weights = output.experts.attribution()
    assert weights.shape == (2, 20, 1)
    assert 0 < (weights > 0).float().mean() < 1
    with model.experts.arming(None):
        assert torch.equal(model(ids).logits, logits)
        assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), text)
    model.experts.unplug("code")
    assert torch.equal(model(ids).logits, logits)

    assert list(model.state_dict()) == keys
    detached = detach(model)
    assert type(detached) is kind
    assert not any(module._forward_hooks for module in detached.modules())
    assert not any(module._forward_pre_hooks for module in detached.modules())
    assert torch.equal(detached(ids).logits, logits)


@torch.no_grad()
def test_decoding_with_a_cache_is_one_pass(stock: PreTrainedModel, ids: torch.Tensor) -> None:
    def steps(model: PreTrainedModel) -> torch.Tensor:
        output = model(ids[:, :9])
        parts = [output.logits]
        for token in range(9, 20):
            output = model(ids[:, token : token + 1], cache=output.cache)
            parts.append(output.logits)
        return torch.cat(parts, dim=1)

    tolerance = 10 * (steps(stock) - stock(ids).logits).abs().max()
    model = attached(stock)
    plug_random(model)
    plug_random(model, "legal", seed=2)
    assert (steps(model) - model(ids).logits).abs().max() < max(tolerance, 1e-5)


@torch.no_grad()
def test_the_experts_of_a_sequence_are_pinned(stock: PreTrainedModel, ids: torch.Tensor) -> None:
    model = attached(stock)
    base = model(ids[:, :9])
    copied = copy.deepcopy(base.cache)
    expected = model(ids[:, 9:], cache=copied).logits
    plug_random(model)
    assert torch.equal(model(ids[:, 9:], cache=base.cache).logits, expected)

    armed = model(ids[:, :9])
    copied = copy.deepcopy(armed.cache)
    expected = model(ids[:, 9:], cache=copied).logits
    model.experts.unplug("code")
    assert torch.equal(model(ids[:, 9:], cache=armed.cache).logits, expected)


@torch.no_grad()
def test_generate(stock: PreTrainedModel, ids: torch.Tensor) -> None:
    model = attached(stock)
    plug_random(model)
    for dials in ({}, {"num_beams": 3}):
        how: dict[str, Any] = {
            "max_new_tokens": 6,
            "min_new_tokens": 6,
            "do_sample": False,
            **dials,
        }
        cached = model.generate(ids, **how)
        assert torch.equal(cached, model.generate(ids, use_cache=False, **how))
        short = model.generate(ids[1:, 4:], **how)
        mask = torch.ones_like(ids)
        mask[1, :4] = 0
        padded = ids.masked_fill(mask == 0, 0)
        batch = model.generate(padded, attention_mask=mask, **how)
        assert torch.equal(batch[1:, 20:], short[:, 16:])


def test_a_saved_model_is_the_stock_one(stock: PreTrainedModel, tmp_path: Path) -> None:
    stock.save_pretrained(tmp_path / "stock")
    model = attached(stock)
    plug_random(model)
    model.save_pretrained(tmp_path / "attached")
    names = sorted(path.name for path in (tmp_path / "stock").iterdir())
    assert sorted(path.name for path in (tmp_path / "attached").iterdir()) == names
    config, same = (tmp_path / name / "config.json" for name in ("stock", "attached"))
    assert same.read_text() == config.read_text()
    tensors, same = (load_file(tmp_path / n / "model.safetensors") for n in ("stock", "attached"))
    assert all(torch.equal(tensors[name], same[name]) for name in tensors | same)


@torch.no_grad()
def test_a_copy_has_experts_of_its_own(stock: PreTrainedModel, ids: torch.Tensor) -> None:
    model = attached(stock)
    plug_random(model)
    logits = model(ids).logits
    copied = copy.deepcopy(model)
    model.experts.unplug("code")
    assert torch.equal(copied(ids).logits, logits)
    assert not torch.equal(model(ids).logits, logits)
