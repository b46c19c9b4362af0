"""Chunked passes of the base alone, for decoders with a cache that can be continued."""

import pytest
import torch
from attached_fixtures import attached, plug_random
from tiny_families import FAMILIES, SMALL, tiny_family
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MiniMaxConfig,
    OpenAIGPTConfig,
    PreTrainedModel,
)

from deepseek.model.attached.model import AttachedModel
from deepseek.model.attached.traits import traits_of
from deepseek.model.language_model import BaseText


def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL)).eval()


def stock(family: str) -> PreTrainedModel:
    return llama() if family == "llama" else tiny_family(family)


def without_cache() -> PreTrainedModel:
    """Return a model whose decoder has no cache argument."""
    config = OpenAIGPTConfig(vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    return AutoModelForCausalLM.from_config(config).eval()


def with_its_own_cache() -> PreTrainedModel:
    """Return a model whose decoder takes only its own class of cache."""
    config = MiniMaxConfig(**SMALL, num_local_experts=2, block_size=8)
    return AutoModelForCausalLM.from_config(config).eval()


def check_chunks(model: AttachedModel) -> None:
    """Check that a text in chunks has the hidden states of one pass, whatever is armed."""
    ids = torch.randint(3, 300, (1, 40), generator=torch.Generator().manual_seed(1))
    whole = traits_of(model).hidden(ids)
    text = BaseText(model)
    assert text.continues
    found = torch.cat([text.hidden(part) for part in ids.split([12, 1, 1, 26], dim=1)], dim=1)
    torch.testing.assert_close(found, whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", *sorted(FAMILIES)])
def test_a_text_comes_in_chunks(family: str) -> None:
    model = attached(stock(family))
    plug_random(model)
    check_chunks(model)


def test_the_cache_has_an_older_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = attached(llama())
    forward = type(model.model).forward

    def older(self, input_ids, past_key_values=None, use_cache=None):
        return forward(self, input_ids, cache=past_key_values, use_cache=use_cache)

    monkeypatch.setattr(type(model.model), "forward", older)
    check_chunks(model)


@pytest.mark.parametrize("make", [without_cache, with_its_own_cache])
def test_without_a_cache_a_text_is_one_chunk(make) -> None:
    model = attached(make())
    text = BaseText(model)
    assert not text.continues
    assert text.hidden(torch.arange(3, 43)[None]).shape == (1, 40, 32)
