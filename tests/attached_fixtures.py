"""Random experts on the tiny models of `tiny_families.py`."""

import torch
from transformers import PreTrainedModel

from deepseek.model.attached.model import AttachedModel, attach
from deepseek.model.experts import ExpertModule
from deepseek.packs.manifest import MOMENTS, BaseDescription

WIDTH = 32


def attached(model: PreTrainedModel) -> AttachedModel:
    """Attach experts to a model that was created in memory."""
    model = attach(model)
    model.experts.base = BaseDescription(
        name="tiny",
        weights="a" * 64,
        tokenizer="b" * 64,
        hidden_size=WIDTH,
        num_layers=model.experts.sites.num_layers,
    )
    return model


def plug_random(model: AttachedModel, name: str = "code", seed: int = 1) -> None:
    """Plug an expert with random output at the last two sites; its gates fire at about half of the
    tokens.
    """
    torch.manual_seed(seed)
    module = ExpertModule(name, model.experts.sites.indices[-2:], WIDTH, 24)
    for layer in module.layers:
        torch.nn.init.normal_(module.at(layer).down_proj, std=0.3)
        moments = torch.randn(MOMENTS, WIDTH) / 4
        module.set_gate(layer, torch.randn(WIDTH + 1) / 4, moments=moments)
    pack = module.to_pack(model.experts.base, "Apache-2.0", dtype=torch.float32)
    model.experts.plug(pack)
