"""`generate` admits experts by the whole prompt, with a cache and without."""

from typing import Any

import pytest
import torch
from attached_fixtures import attached
from tiny_families import SMALL, tiny_family
from tiny_model import tiny_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from deepseek.errors import ConfigError
from deepseek.model.experts import ExpertModule
from deepseek.model.experts.relevance import Relevance
from deepseek.model.language_model import LanguageModel, expert_beside

ASKED = (5, 17, 33, 12, 80, 33)
RULED_OUT = (5, 17, 60, 12, 80, 33)
HOW: dict[str, Any] = {
    "max_new_tokens": 12,
    "do_sample": False,
    "pad_token_id": 0,
    "eos_token_id": None,
}


def stock() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL)).eval()


def models() -> dict[str, LanguageModel]:
    return {"own": tiny_model().model, "attached": attached(stock())}


@pytest.fixture(params=["own", "attached"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return models()[request.param]


def expert(model: LanguageModel, tested: bool) -> ExpertModule:
    """Return an expert whose gates fire everywhere.

    Args:
        model: the model.
        tested: whether it has a relevance table in which every token outside `ASKED` rules it out.
    """
    module = expert_beside(model, "tested" if tested else "untested", [1, 2], 16, seed=1)
    torch.manual_seed(1)
    for layer in module.layers:
        torch.nn.init.normal_(module.at(layer).down_proj, std=0.3)
        always = torch.zeros(module.hidden_size + 1)
        always[-1] = 1.0
        module.set_gate(layer, always)
    if tested:
        table_V = torch.full((model.config.vocab_size,), -18.0)
        table_V[list(ASKED)] = 0.0
        module.relevance = Relevance(table_V, 3.5, 0.0)
        module.settings = module.settings.model_copy(update={"relevance_threshold": 3.5})
    return module.requires_grad_(False)


def plug(model: LanguageModel, tested: bool) -> None:
    model.experts.plug(expert(model, tested).to_pack(model.experts.base, "Apache-2.0"))


def embeddings(model: LanguageModel, ids: Tensor) -> Tensor:
    embedded: Tensor = model.get_input_embeddings()(ids)
    return embedded


@torch.no_grad()
@pytest.mark.parametrize(
    "dials", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}]
)
def test_generated_tokens_are_no_evidence(model: LanguageModel, dials: dict[str, Any]) -> None:
    prompts = torch.tensor([ASKED, RULED_OUT])
    how = HOW | dials
    base = model.generate(prompts, **how)
    plug(model, tested=True)
    cached = model.generate(prompts, **how)
    assert torch.equal(model.generate(prompts, use_cache=False, **how), cached)
    rows = len(base) // 2
    assert not torch.equal(cached[:rows], base[:rows])
    assert torch.equal(cached[rows:], base[rows:])
    with model.experts.arming(None):
        assert torch.equal(model.generate(prompts, use_cache=False, **how), base)


@torch.no_grad()
def test_padding_is_no_evidence_without_a_cache(model: LanguageModel) -> None:
    plug(model, tested=True)
    alone = model.generate(torch.tensor([ASKED]), use_cache=False, **HOW)
    prompt = torch.tensor([(60, 60, *ASKED)])
    mask = torch.tensor([[0, 0] + [1] * len(ASKED)])
    padded = model.generate(prompt, attention_mask=mask, use_cache=False, **HOW)
    assert torch.equal(padded[:, 2:], alone)


@torch.no_grad()
def test_a_prompt_of_embeddings_admits_every_armed_expert(model: LanguageModel) -> None:
    ids = torch.tensor([RULED_OUT])
    prompt = embeddings(model, ids)
    base = model.generate(ids, **HOW)[:, ids.shape[1] :]
    assert torch.equal(model.generate(inputs_embeds=prompt, **HOW), base)
    plug(model, tested=False)
    expected = model.generate(ids, **HOW)[:, ids.shape[1] :]
    assert not torch.equal(expected, base)
    assert torch.equal(model.generate(inputs_embeds=prompt, **HOW), expected)
    model.experts.unplug("untested")
    plug(model, tested=True)
    assert torch.equal(model.generate(inputs_embeds=prompt, **HOW), expected)
    model.experts.arm({"tested": 0.5})
    weaker = model.generate(
        inputs_embeds=prompt, output_scores=True, return_dict_in_generate=True, **HOW
    )
    model.experts.arm({"tested": 1.0})
    full = model.generate(
        inputs_embeds=prompt, output_scores=True, return_dict_in_generate=True, **HOW
    )
    assert not torch.equal(weaker.scores[-1], full.scores[-1])


@torch.no_grad()
def test_a_forced_expert_needs_no_prompt(model: LanguageModel) -> None:
    ids = torch.tensor([RULED_OUT])
    with model.experts.forced(expert(model, tested=True)):
        expected = model.generate(ids, **HOW)
        assert torch.equal(model.generate(ids, use_cache=False, **HOW), expected)
        found = model.generate(inputs_embeds=embeddings(model, ids), **HOW)
        assert torch.equal(found, expected[:, ids.shape[1] :])


@torch.no_grad()
def test_attaching_changes_nothing_about_embeddings() -> None:
    model = stock()
    prompt = embeddings(model, torch.tensor([ASKED]))
    expected = model.generate(inputs_embeds=prompt, **HOW)
    assert torch.equal(attached(model).generate(inputs_embeds=prompt, **HOW), expected)
    refusing = tiny_family("falcon_h1")
    prompt = embeddings(refusing, torch.tensor([ASKED]))
    with pytest.raises(ValueError, match="forwarding implemented"):
        refusing.generate(inputs_embeds=prompt, **HOW)
    with pytest.raises(ConfigError, match="FalconH1ForCausalLM does not generate from"):
        attached(refusing).generate(inputs_embeds=prompt, **HOW)
