"""A stock decoder that is stopped and resumed gives the uninterrupted result, in every family."""

import pytest
import torch
from attached_fixtures import attached, plug_random
from tiny_families import FAMILIES, tiny_family

from deepseek.errors import ConfigError
from deepseek.model.attached.forward_pass import can_cut
from deepseek.model.attached.model import AttachedModel
from deepseek.model.attached.traits import traits_of
from deepseek.model.language_model import output_head
from deepseek.model.passes import begin, resume

CUTS = {"gemma4_text": {0}}
"""Layers at which families can be cut whose upper layers need more than the lower hidden states."""

MIXES_DOCUMENTS = {
    "falcon_h1",
    "gpt_oss",
    "granitemoehybrid",
    "lfm2",
    "nemotron_h",
    "qwen3_5_text",
    "qwen3_next",
}
"""Families in which one document of a packed row would affect the next."""


@pytest.fixture(params=sorted(FAMILIES))
def model(request: pytest.FixtureRequest) -> AttachedModel:
    model = attached(tiny_family(request.param))
    model.requires_grad_(False)
    plug_random(model)
    return model


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 300, (2, 16), generator=torch.Generator().manual_seed(1))


def positions(*lengths: int) -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None]


def test_finish_leads_to_the_models_logits(model: AttachedModel, ids: torch.Tensor) -> None:
    head = output_head(model)
    expected = model(ids).logits
    assert torch.allclose(head.logits(begin(model, ids).finish()), expected, rtol=1e-4, atol=1e-4)
    with model.experts.arming(None):
        base = head.logits(begin(model, ids).finish())
        assert torch.allclose(base, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(base, expected, rtol=1e-4, atol=1e-4)


def test_stops_and_resumes(model: AttachedModel, ids: torch.Tensor) -> None:
    whole = begin(model, ids).finish()
    layers = model.experts.sites.num_layers
    for layer in range(layers + 1):
        step = begin(model, ids)
        stream = step.run_to(layer)
        assert torch.equal(step.finish(), whole)
        assert torch.equal(resume(model, stream, layer, input_ids=ids).finish(), whole)
    cut = {layer for layer in range(layers) if can_cut(model, layer)}
    assert cut == CUTS.get(model.config.model_type, set(range(layers)))


def test_a_pass_that_has_finished_stays_where_it_was(
    model: AttachedModel, ids: torch.Tensor
) -> None:
    layers = model.experts.sites.num_layers
    step = begin(model, ids)
    step.run_to(1)
    whole = step.finish()
    assert torch.equal(step.finish(last=5), whole[:, -5:])
    assert torch.equal(step.run_to(layers), begin(model, ids).run_to(layers))
    assert torch.equal(step.finish(), whole)


def test_gate_inputs_from_layer_to_layer(model: AttachedModel, ids: torch.Tensor) -> None:
    """Read gate inputs layer by layer, as calibration does, and compare with hooks in one pass."""
    seen = {}
    handles = [
        model.get_submodule(site.path).register_forward_pre_hook(
            lambda _module, args, layer=site.layer: seen.update({layer: args[0]})
        )
        for site in model.experts.sites
    ]
    model(ids)
    for handle in handles:
        handle.remove()
    first = model.experts.sites.indices[0]
    step = begin(model, ids)
    step.run_to(first)
    step = resume(model, step.attend(), first, attended=True, input_ids=ids)
    for layer in model.experts.sites.indices:
        if layer > first:
            step.run_to(layer)
        assert torch.equal(step.gate_input(), seen[layer].view(2, 16, -1))


def test_documents_of_a_packed_row_stand_alone(model: AttachedModel, ids: torch.Tensor) -> None:
    separates = model.config.model_type not in MIXES_DOCUMENTS
    assert traits_of(model).separates_documents == separates
    place = positions(5, 8, 3).expand(2, -1)
    step = begin(model, ids, position_ids=place)
    packed = step.finish()
    for first, last in ((0, 5), (5, 13), (13, 16)):
        alone = begin(model, ids[:, first:last]).finish()
        assert torch.allclose(packed[:, first:last], alone, rtol=1e-4, atol=1e-4)
    layer = model.experts.sites.indices[-2]
    step = begin(model, ids, position_ids=place)
    step.run_to(layer)
    stream = step.attend()
    cut = resume(model, stream, layer, attended=True, input_ids=ids, position_ids=place)
    assert torch.equal(cut.finish(), packed)


@pytest.mark.parametrize("family", ["lfm2", "gemma3_text"])
def test_positions_of_one_row_are_those_of_all(family: str, ids: torch.Tensor) -> None:
    model = attached(tiny_family(family))
    plug_random(model)
    assert traits_of(model).separates_documents == (family not in MIXES_DOCUMENTS)
    one = positions(5, 8, 3)
    packed = begin(model, ids, position_ids=one.expand(2, -1)).finish()
    for place in (one, one[0]):
        assert torch.equal(begin(model, ids, position_ids=place).finish(), packed)
    for wrong in (one.expand(3, -1), one[:, 1:], one - 1, one.float()):
        with pytest.raises(ConfigError, match="position"):
            begin(model, ids, position_ids=wrong)


@pytest.mark.parametrize("family", ["lfm2", "gemma3_text"])
@pytest.mark.parametrize("start", [0, 2, 9])
def test_any_step_but_one_starts_a_document(family: str, start: int, ids: torch.Tensor) -> None:
    model = attached(tiny_family(family))
    plug_random(model)
    place = torch.cat([torch.arange(5), torch.arange(start, start + 11)]).expand(2, -1)
    packed = begin(model, ids, position_ids=place).finish()
    alone = begin(model, ids[:, 5:], position_ids=place[:, 5:]).finish()
    assert torch.allclose(packed[:, 5:], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["lfm2", "gemma3_text"])
def test_packed_rows_have_no_padding(family: str, ids: torch.Tensor) -> None:
    model = attached(tiny_family(family))
    plug_random(model)
    place = positions(5, 8, 3).expand(2, -1)
    packed = begin(model, ids, position_ids=place).finish()
    mask = torch.ones_like(ids)
    masked = begin(model, ids, position_ids=place, attention_mask=mask).finish()
    assert torch.equal(masked, packed)
    mask[0, :2] = 0
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": place}
    ctx = model.expert_hooks.context(given)  # as in the model's own forward
    assert ctx is not None and ctx.document_ids_BT is not None
    assert ctx.document_ids_BT[:, [2, 4, 5, 12, 13]].tolist() == [[0, 0, 1, 1, 2]] * 2
    with pytest.raises(ConfigError, match="packed documents or padding"):
        begin(model, ids, position_ids=place, attention_mask=mask)
    left = (mask.cumsum(-1) - 1).clamp(min=0)
    found = begin(model, ids, position_ids=left, attention_mask=mask).finish()
    alone = begin(model, ids[:1, 2:]).finish()
    assert torch.allclose(found[:1, 2:], alone, rtol=1e-4, atol=1e-4)


def test_a_pass_never_goes_back(ids: torch.Tensor) -> None:
    model = attached(tiny_family("gemma3_text"))
    step = begin(model, ids)
    step.run_to(2)
    for layer in (1, 9):
        with pytest.raises(ConfigError, match="cannot go to layer"):
            step.run_to(layer)
    step.attend()
    with pytest.raises(ConfigError, match="after the attention of layer 2"):
        step.attend()


def test_resuming_without_ids(ids: torch.Tensor) -> None:
    model = attached(tiny_family("gemma3_text"))
    stream = begin(model, ids).run_to(2)
    assert torch.equal(resume(model, stream, 2).finish(), begin(model, ids).finish())
    model = attached(tiny_family("gemma4_text"))
    with pytest.raises(ConfigError, match="pass input_ids"):
        resume(model, stream, 3)


def test_a_lack_of_memory_says_nothing_about_the_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    model = attached(tiny_family("gemma3_text"))

    def started(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: not enough memory")

    with monkeypatch.context() as patch:
        patch.setattr("deepseek.model.attached.forward_pass._started", started)
        with pytest.raises(RuntimeError, match="not enough memory"):
            can_cut(model, 2)
    assert can_cut(model, 2)


def test_gradients_reach_an_expert_from_a_stored_stream(ids: torch.Tensor) -> None:
    model = attached(tiny_family("qwen3_5_text")).requires_grad_(False)
    plug_random(model)
    module = model.experts._state.plugged[0].module.requires_grad_(True)
    stream = begin(model, ids).run_to(2)
    with model.experts.forced(module):
        resume(model, stream, 2, input_ids=ids).finish().square().mean().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in module.parameters())
