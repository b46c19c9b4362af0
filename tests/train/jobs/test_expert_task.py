"""Paces of an expert's down projections (`train/jobs/expert_task.py`), which follow what the base's
own feed-forward networks add.
"""

from collections.abc import Sequence

import pytest
import torch
from attached_fixtures import attached
from tiny_families import FAMILIES, tiny_family
from tiny_model import tiny_model

from deepseek.data import Batch
from deepseek.model.language_model import LanguageModel, expert_beside, expert_layers
from deepseek.train.jobs.expert_task import output_paces
from deepseek.train.loop.optim import OptimConfig, adamw
from deepseek.train.text.trunk_cache import run_trunk


def batch() -> Batch:
    ids = torch.randint(3, 20, (2, 24), generator=torch.Generator().manual_seed(0))
    return Batch(ids, ids.roll(-1, 1), torch.arange(24).expand(2, -1), torch.arange(2))


def paces(model: LanguageModel, layers: Sequence[int]) -> dict[str, float]:
    rows = batch()
    return output_paces(model, layers, rows, run_trunk(model, layers[0], rows))


def test_the_pace_of_a_layer_is_in_proportion_to_what_its_network_adds() -> None:
    model = tiny_model().model
    last = len(model.layers) - 1
    name = f"ffn.{last}.down_proj"
    weight = model.layers[last].feed_forward.down_proj.weight.detach()
    weight.mul_(0.5)
    before = paces(model, [last])[name]
    assert 0 < before < 1
    weight.mul_(0.25)
    assert paces(model, [last]) == {name: pytest.approx(0.25 * before, rel=0.02)}
    weight.mul_(1e6)
    assert paces(model, [last]) == {name: 1.0}, "what learns beside SmolLM2 is no faster elsewhere"


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_has_paces_and_its_parameters_take_them(family: str) -> None:
    """For dense networks and mixtures, whatever their modules return."""
    model = attached(tiny_family(family)).requires_grad_(False)
    layers = expert_layers(model)[-2:]
    found = paces(model, layers)
    assert all(0 < pace <= 1 for pace in found.values())
    module = expert_beside(model, "words", layers, 24)
    optimizer = adamw(dict(module.named_parameters()), OptimConfig(learning_rate=0.1, paces=found))
    rates = {
        id(parameter): group["lr"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for name, parameter in module.named_parameters():
        assert rates[id(parameter)] == pytest.approx(0.1 * found.get(name, 1.0))
    assert set(found) <= {name for name, _ in module.named_parameters()}
